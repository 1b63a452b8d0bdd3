"""What the models of all families share: their outputs, and how they are saved and loaded."""

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .downloads import checked_downloads
from .files import check_indexes, drop_links, read_object, write_text
from .fused_encoder import is_hooked
from .own_reducers import own_code
from .reducers import REDUCERS

# How many weights a model may have beside those of its checkpoint.
NEW_WEIGHTS = 50_000_000


def take_over_names(own: Sequence[str], plain: str) -> None:
    """Let classes of this library load what a class of transformers does, under old names, too.

    transformers renames the weights of old checkpoints by the names of classes.

    Raises:
        ImportError: if transformers knows no old names of that class any more.
    """
    mapping = get_checkpoint_conversion_mapping(plain)
    if mapping is None:
        raise ImportError(
            f"this release of transformers has no conversion mapping of {plain}: old checkpoints "
            "would load without their weights. Install one that this library supports"
        )
    for name in own:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def check_contents(model: nn.Module, files: Sequence[str | os.PathLike] | None) -> None:
    """Check that a model is not far larger than what its checkpoint can hold.

    Args:
        files: of the checkpoint; ``None`` for weights that are at hand.

    Raises:
        ValueError: for a model with more weights than two per byte of the files, plus those that a
            new head may have.
    """
    if files is None:
        return
    held = sum(os.path.getsize(file) for file in files)
    weights = sum(weight.numel() for weight in model.parameters())
    if weights > 2 * held + NEW_WEIGHTS:
        raise ValueError(
            f"{os.path.dirname(files[0])}: config.json says {weights:,} weights, and the files of "
            f"{held:,} bytes cannot hold them"
        )


# What transformers hands to a model beside the arguments that it names.
_OPTIONS = {
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",  # of a Trainer, to any model
}


def num_read(model: Any, wanted: int | None) -> int | None:
    """How many tokens are read of what an encoder hands out in a call; ``None`` for all.

    Args:
        wanted: by whoever has called it, instead of its own number.

    Raises:
        ValueError: for more than the model has, or none.
    """
    most = model.config.num_prefix_tokens
    if wanted is not None and not 1 <= wanted <= most:
        raise ValueError(
            f"num_read_tokens={wanted!r} is not allowed in {type(model).__name__}, which has "
            f"{most} prefix tokens"
        )
    wanted = model.num_read_tokens if wanted is None else wanted
    # Whoever has hooked on to what runs behind the layers looks at all.
    return None if any(map(is_hooked, (model, *model.children()))) else wanted


def check_reads_class_token(model: Any) -> None:
    """Raise ValueError if a model that reads all tokens is to skip those that are not read."""
    if model.config.skip_unread:
        raise ValueError(
            f"skip_unread={model.config.skip_unread!r} is not allowed in {type(model).__name__}, "
            "which reads all tokens"
        )


def check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options of a call that no model of this library has."""
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"{type(model).__name__} takes no arguments {unknown}")


@dataclass
class MCTFModelOutput(BaseModelOutputWithPooling):
    """Output of a backbone; the last three fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of,
            -1 where it was dropped.
        assignments: of each layer (b, n), the assignment to the tokens that leave it.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None


@dataclass
class MCTFImageClassifierOutput(ImageClassifierOutput):
    """Output of a classifier; the last six fields are filled by ``output_fusion=True``.

    Those of the head are filled by ``output_features=True``, too.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of,
            -1 where it was dropped.
        features: (b, d), what the head reads: the class token after the final LayerNorm, or the
            mean of the patch tokens in a model without class token.
        label_logits: (b, labels), of the heads that learn the labels, in a model with another one.
        distillation_logits: (b, labels), of the head that learns from another classifier.
        assignments: of each layer (b, n), the assignment to the tokens that leave it.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    features: Tensor | None = None
    label_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None


class MCTFPreTrainedMixin:
    """How all models of this library are saved and loaded; goes before one of transformers.

    Attributes:
        renamed: what else their weights are called in checkpoints, as patterns.
    """

    renamed: ClassVar[dict[str, str]] = {}
    # Proportional attention adds a number to the scores, which these kernels cannot.
    _supports_flash_attn = False
    _supports_flex_attn = False
    config: Any

    @property
    def num_read_tokens(self) -> int | None:
        """How many tokens are read behind the last layer: prefix tokens, or ``None`` for all."""
        return 1 if self.config.skip_unread else None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as every transformers model does; weights that are downloaded are checked.

        Raises:
            OSError: for weights that arrived damaged, besides what transformers raises.
            ValueError: for an index of weights that names files outside of its folder.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)  # type: ignore[misc]
        if cls.renamed:
            kwargs["key_mapping"] = cls.renamed | (kwargs.get("key_mapping") or {})
        check_indexes(pretrained_model_name_or_path)
        with checked_downloads(pretrained_model_name_or_path, kwargs.get("cache_dir")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Until here, the model's weights are on the meta device and take no memory.
        check_contents(model, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *args, **kwargs
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as every transformers model does, along with the code that a stranger needs.

        A link in the place of one of these files is replaced, not followed. ``auto_map`` names all
        classes of the family, so that what one of them saved loads as any of them with
        ``trust_remote_code=True``. A reducer that somebody registered goes along.

        Raises:
            ValueError: for a reducer of one's own that cannot, see :func:`.own_reducers.own_code`.
        """
        classes = dict(self.config.auto_classes)
        # Not the configuration's word for it, which may come from another copy of this library.
        source = Path(str(sys.modules[type(self).__module__].__file__))
        modules = {Path(str(file)).stem for file in (source, *get_relative_import_files(source))}
        files, auto_map = own_code(REDUCERS.get(self.config.reduction), classes, modules)
        if files and kwargs.get("push_to_hub"):
            raise ValueError(
                f"push_to_hub=True is not allowed with reduction={self.config.reduction!r}, which "
                "is not of this library: save the model, then use its push_to_hub()"
            )
        self.config.auto_map = classes
        # Not by the names that the weights were loaded by, which may be those of another class.
        kwargs.setdefault("save_original_format", False)
        if is_main_process:
            drop_links(save_directory, {*(f"{module}.py" for module in modules), *files})
        super().save_pretrained(save_directory, is_main_process, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        if files:
            for name, content in files.items():
                write_text(Path(save_directory, name), content)
            config = Path(save_directory, "config.json")
            settings = {**read_object(config), "auto_map": auto_map}
            write_text(config, json.dumps(settings, indent=2) + "\n")
        modules |= {Path(name).stem for name in files}
        for module in {reference.split(".")[0] for reference in auto_map.values()}:
            _name_all(Path(save_directory, f"{module}.py"), modules - {module})


def _name_all(file: Path, modules: Collection[str]) -> None:
    """Let a module name all that it needs, of which releases before 5 copy but what it names.

    They can then run it, and it tells which release it needs.
    """
    lacking = sorted(set(modules) - set(get_relative_imports(file))) if file.exists() else []
    if lacking:
        lines = [f"    from .{module} import __name__\n" for module in lacking]
        text = f"{file.read_text(encoding='utf-8')}\nif False:  # named, not imported\n"
        write_text(file, text + "".join(lines))
