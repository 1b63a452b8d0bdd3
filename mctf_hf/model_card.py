"""Model cards for the Hub: what a model is, how to load it, and what was measured."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .configuration_mctf import EncoderConfigMixin
from .cost import describe
from .model_folder import TUNING_PICTURE
from .problems import QUALITIES, problem_type
from .registry import output_of
from .schedule import KeepRate, TokensFused

_TASKS = {
    "logits": "image-classification",
    "image_embeds": "image-feature-extraction",
    "last_hidden_state": "image-feature-extraction",
}
TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class Publication:
    """A method of token reduction and its publication."""

    name: str
    arxiv: str
    citation: str


CITED = {
    "mctf": Publication(
        "Multi-criteria Token Fusion",
        "2403.10030",
        """@inproceedings{lee2024mctf,
  title     = {Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
               Transformers},
  author    = {Lee, Sanghyeok and Choi, Joonmyung and Kim, Hyunwoo J.},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2024}
}""",
    ),
    "tome": Publication(
        "Token Merging",
        "2210.09461",
        """@inproceedings{bolya2023tome,
  title     = {Token Merging: Your {ViT} but Faster},
  author    = {Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and
               Feichtenhofer, Christoph and Hoffman, Judy},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023}
}""",
    ),
    "pitome": Publication(
        "PiToMe",
        "2405.16148",
        """@inproceedings{tran2024pitome,
  title     = {Accelerating Transformers with Spectrum-Preserving Token Merging},
  author    = {Tran, Hoai-Chau and Nguyen, Duy M. H. and Nguyen, Duy M. and Nguyen, Trung-Tin and
               Le, Ngan and Xie, Pengtao and Sonntag, Daniel and Zou, James Y. and
               Nguyen, Binh T. and Niepert, Mathias},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2024}
}""",
    ),
    "diffrate": Publication(
        "DiffRate",
        "2305.17997",
        """@inproceedings{chen2023diffrate,
  title     = {{DiffRate}: Differentiable Compression Rate for Efficient Vision Transformers},
  author    = {Chen, Mengzhao and Shao, Wenqi and Xu, Peng and Lin, Mingbao and Zhang, Kaipeng and
               Chao, Fei and Ji, Rongrong and Qiao, Yu and Luo, Ping},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2023}
}""",
    ),
    "evit": Publication(
        "Token reorganization",
        "2202.07800",
        """@inproceedings{liang2022evit,
  title     = {Not All Patches are What You Need: Expediting Vision Transformers via Token
               Reorganizations},
  author    = {Liang, Youwei and Ge, Chongjian and Tong, Zhan and Song, Yibing and Wang, Jue and
               Xie, Pengtao},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2022}
}""",
    ),
    "token_mergence": Publication(
        "Token mergence",
        "2306.04897",
        """@article{bian2023mergence,
  title   = {Multi-Scale And Token Mergence: Make Your {ViT} More Efficient},
  author  = {Bian, Zhe and Wang, Zhe and Han, Wenqiang and Wang, Kangping},
  journal = {arXiv preprint arXiv:2306.04897},
  year    = {2023}
}""",
    ),
}


@dataclass
class Measurement:
    """Measurements of a model with one fusion setting.

    Attributes:
        name: name of the setting.
        r: tokens fused per layer, as in the configuration; 0 for the plain model, ``None`` if
            ``keep_rate`` is set instead.
        gmacs: multiply-accumulates of one image, in units of 1e9.
        images_per_second: median speed.
        ratio: speed relative to the plain model in the same run.
        accuracy: mean of the evaluation's metric; ``None`` if it was not measured.
        keep_rate: fraction of the patch tokens that layers keep, as in the configuration.
    """

    name: str
    gmacs: float
    images_per_second: float
    ratio: float
    accuracy: float | None = None
    r: TokensFused | None = None
    keep_rate: KeepRate | None = None


@dataclass
class Evaluation:
    """Measurements of a model, and the data and the machine used.

    Attributes:
        plain: the same weights without fusion, in the transformers model if there is one.
        own: the model with its own configuration.
        others: the model with other amounts of fusion.
        dataset: id on the Hub or name of the dataset; ``None`` if accuracy was not measured.
        split: split of the dataset.
        num_images: number of images for accuracy.
        batch_size: images per call for speed.
        machine: name of the processor, number of threads and versions of libraries.
        metric: name of the :class:`.Quality` in the field ``accuracy``.
    """

    plain: Measurement
    own: Measurement
    others: list[Measurement]
    batch_size: int
    machine: str
    dataset: str | None = None
    split: str | None = None
    num_images: int = 0
    metric: str = "accuracy"

    def rows(self) -> list[Measurement]:
        """All measurements, the most expensive first."""
        return sorted((self.plain, self.own, *self.others), key=lambda row: -row.gmacs)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def check_base_model(base_model: str) -> None:
    """Raise ValueError unless ``base_model`` is a valid id for the Hub."""
    try:
        validate_repo_id(base_model)
    except ValueError as error:
        raise ValueError(f"base_model={base_model!r} is not allowed: {error}") from error


def code(value: object, most: int = 200) -> str:
    """Any value as inline code for a cell of a Markdown table: on one line and escaped."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)[:most])
    text = " ".join(text.translate({ord("`"): "'", ord("|"): "/"}).split())
    return f"`{text or ' '}{'…' if len(str(value)) > most else ''}`"


def word(value: object) -> str:
    """A name for Markdown text, as code unless it has only letters, digits and ``_./-``."""
    text = str(value)
    return text if re.fullmatch(r"[\w./-]{1,200}", text) else code(text)


def make_card(
    repo_id: str,
    config: EncoderConfigMixin,
    *,
    license: str,
    evaluation: Evaluation | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    training: dict[str, Any] | None = None,
    tuning: dict[str, Any] | None = None,
    picture: str | None = None,
    model: Any = None,
) -> ModelCard:
    """Write a model's card.

    Args:
        repo_id: ``organisation/name`` of the model on the Hub.
        license: identifier of the weights' license, such as ``apache-2.0``.
        evaluation: measurements of the model.
        base_model: Hub id of the model that this one was made from.
        datasets: Hub ids of the datasets that the model was trained on.
        training: training settings by name.
        tuning: record of the search for the fusion setting, as ``mctf tune`` writes it.
        picture: file in the folder of the card that shows fused tokens.
        model: model that the card describes; unset, the configuration's classifier.

    Raises:
        ValueError: for a ``base_model`` that is not a valid id.
    """
    if base_model is not None:
        check_base_model(base_model)
    output = "logits" if model is None else output_of(model)
    described = describe(config if model is None else model)
    results = None if evaluation is None else _results(evaluation, output)
    data = ModelCardData(
        license=license,
        base_model=base_model,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag=_TASKS[output],
        tags=["vision", "vit", "token-fusion", "token-merging", "mctf", "custom_code"],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        repo_id=repo_id,
        config=config,
        method=CITED.get(config.reduction),
        amount=None if config.reducer_class is None else config.reducer_class.amount,
        settings=config.fusion_settings(),
        tokens=_tokens_by_layer(config),
        base_gmacs=described.unfused / 1e9,
        gmacs=described.of(config) / 1e9,
        output=output,
        problem=problem_type(config),
        judged=None if evaluation is None else QUALITIES[evaluation.metric],
        evaluation=evaluation,
        base_model=base_model,
        training=training,
        tuning=_ranking(tuning or {}),
        tuning_picture=TUNING_PICTURE,
        picture=picture,
        code=code,
        word=word,
    )


def _ranking(tuning: dict[str, Any]) -> dict[str, Any] | None:
    """Search results for the card, with numbers as text; ``None`` if there was no search."""
    rows = tuning.get("ranking")
    if not isinstance(rows, list):
        return None
    columns = {"gmacs": ".4g", "loss": ".5f", "agreement": ".2f", "accuracy": ".2f", "speed": ".2f"}
    rows = [row for row in rows if isinstance(row, dict)]
    shown = [name for name in columns if any(_is_number(row.get(name)) for row in rows)]
    goals = ("budget", "speed", "max_loss")
    return {
        "goal": ", ".join(
            f"{goal} {tuning[goal]}" for goal in goals if _is_number(tuning.get(goal))
        ),
        "images": tuning.get("images"),
        "num_images": tuning.get("num_images"),
        "columns": shown,
        "rows": [
            [
                code(row.get("setting")),
                *[
                    f"{row[name]:{columns[name]}}" if _is_number(row.get(name)) else ""
                    for name in shown
                ],
            ]
            for row in rows
        ],
    }


def _is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number of printable size."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -1e100 < value < 1e100  # type: ignore[operator]


def _tokens_by_layer(config: EncoderConfigMixin) -> list[int]:
    """Number of tokens that enter the first layer, and that leave each layer."""
    tokens = [config.num_tokens()]
    for fused in config.tokens_fused(tokens[0]):
        tokens.append(tokens[-1] - fused)
    return tokens


def _results(evaluation: Evaluation, output: str) -> list[EvalResult]:
    """Measurements of the model's own setting, in the format of the Hub's ``model-index``."""
    task = _TASKS[output]
    own, judged = evaluation.own, QUALITIES[evaluation.metric]
    measured = [
        (judged.name, judged.long_title, own.accuracy),
        ("gmacs", "10^9 multiply-accumulates per image", own.gmacs),
        ("images_per_second", f"Images per second, {evaluation.machine}", own.images_per_second),
        ("speedup", "Speed relative to the model without fusion", own.ratio),
    ]
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=evaluation.dataset or "random-images",
            dataset_name=evaluation.dataset or "Random images",
            dataset_split=evaluation.split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, value in measured
        if value is not None
    ]


def public_name(name: str | None) -> str | None:
    """Public name of a model or dataset: its Hub id, or the last part of a local path."""
    if name is None or (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name)):
        return name
    return Path(name).resolve().name
