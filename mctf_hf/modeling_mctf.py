"""Outputs, saving and loading of the models of all families."""

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

# Number of weights that a model may have in addition to those of its checkpoint.
NEW_WEIGHTS = 50_000_000


def take_over_names(own: Sequence[str], plain: str) -> None:
    """Let classes of this library load checkpoints with the old weight names of ``plain``.

    transformers renames the weights of old checkpoints by a mapping for each class name.

    Raises:
        ImportError: if transformers no longer has a mapping for ``plain``.
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
    """Check that a model does not have many more weights than its checkpoint can contain.

    Args:
        files: files of the checkpoint; ``None`` for weights in memory.

    Raises:
        ValueError: for more than two weights per byte of the files plus ``NEW_WEIGHTS``.
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


# Keyword arguments that transformers passes to a model besides the named arguments.
_OPTIONS = {
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",  # a Trainer passes it to any model
}


def num_read(model: Any, wanted: int | None) -> int | None:
    """Number of prefix tokens that the last layer outputs in a call; ``None`` for all tokens.

    Args:
        wanted: number that the caller asks for; ``None`` for the model's own number.

    Raises:
        ValueError: for a number below 1 or above the model's number of prefix tokens.
    """
    most = model.config.num_prefix_tokens
    if wanted is not None and not 1 <= wanted <= most:
        raise ValueError(
            f"num_read_tokens={wanted!r} is not allowed in {type(model).__name__}, which has "
            f"{most} prefix tokens"
        )
    wanted = model.num_read_tokens if wanted is None else wanted
    # Hooks on the model or its direct parts get all tokens.
    return None if any(map(is_hooked, (model, *model.children()))) else wanted


def mean_patches(hidden_states: Tensor, token_sizes: Tensor | None, prefix: int) -> Tensor:
    """Mean over patches: tokens (b, n, d), weighted by sizes (b, n) if given -> (b, d)."""
    patches = hidden_states[:, prefix:]
    if token_sizes is None:
        return patches.mean(1)
    weights = token_sizes[:, prefix:, None].to(patches.dtype)
    return (patches * weights).sum(1) / weights.sum(1)


def check_reads_class_token(model: Any) -> None:
    """Raise ValueError if ``skip_unread`` is set for a model that reads all tokens."""
    if model.config.skip_unread:
        raise ValueError(
            f"skip_unread={model.config.skip_unread!r} is not allowed in {type(model).__name__}, "
            "which reads all tokens"
        )


def check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError for keyword arguments that no model of this library accepts."""
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(f"{type(model).__name__} takes no arguments {unknown}")


@dataclass
class MCTFModelOutput(BaseModelOutputWithPooling):
    """Output of a backbone; the last three fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), number of embedded tokens in each final token.
        assignment: (b, n) int64, index of the final token that each embedded token is part of, -1
            for dropped tokens.
        assignments: one (b, n) assignment per layer, to the output tokens of that layer.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None


@dataclass
class MCTFImageClassifierOutput(ImageClassifierOutput):
    """Output of a classifier; the last six fields are filled by ``output_fusion=True``.

    ``output_features=True`` also fills ``features`` and the logits of single heads.

    Attributes:
        token_sizes: (b, m), number of embedded tokens in each final token.
        assignment: (b, n) int64, index of the final token that each embedded token is part of, -1
            for dropped tokens.
        features: (b, d or 2 d), input of the head, from ``last_hidden_state``: the class token, the
            mean of the patch tokens, or both.
        label_logits: (b, labels), logits for the labels, in a model with a distillation head.
        distillation_logits: (b, labels), logits of the head that learns from another classifier.
        assignments: one (b, n) assignment per layer, to the output tokens of that layer.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    features: Tensor | None = None
    label_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None


class MCTFPreTrainedMixin:
    """Saving and loading of all models of this library; mixed in before a transformers class.

    Attributes:
        renamed: patterns of weight names in other checkpoints, and their replacements.
    """

    renamed: ClassVar[dict[str, str]] = {}
    # Proportional attention adds a bias to the scores, which these kernels do not support.
    _supports_flash_attn = False
    _supports_flex_attn = False
    config: Any

    @property
    def num_read_tokens(self) -> int | None:
        """Number of prefix tokens that are read after the last layer; ``None`` for all tokens."""
        return 1 if self.config.skip_unread else None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as every transformers model does; downloaded weights are checked.

        Raises:
            OSError: for weights damaged in the download, and the errors of transformers.
            ValueError: for a weight index that names files outside of its folder.
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
        """Save as every transformers model does, with the code that loads it without this library.

        A link in the place of a saved file is replaced, not followed. ``auto_map`` contains all
        classes of the family, so each of them can load the checkpoint with
        ``trust_remote_code=True``. The module of a custom reducer is saved too.

        Raises:
            ValueError: for a custom reducer that cannot be saved, see
                :func:`.own_reducers.own_code`, or that is saved with ``push_to_hub=True``.
        """
        classes = dict(self.config.auto_classes)
        # The class of the configuration may come from another copy of this library.
        source = Path(str(sys.modules[type(self).__module__].__file__))
        modules = {Path(str(file)).stem for file in (source, *get_relative_import_files(source))}
        files, auto_map = own_code(REDUCERS.get(self.config.reduction), classes, modules)
        if files and kwargs.get("push_to_hub"):
            raise ValueError(
                f"push_to_hub=True is not allowed with reduction={self.config.reduction!r}, which "
                "is not of this library: save the model, then use its push_to_hub()"
            )
        self.config.auto_map = classes
        # Not with the names in the loaded checkpoint, which may be those of another class.
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
    """Make a module name all modules that it needs, because releases before 5 copy only these.

    Such a release can then run the module, which reports the release that it needs.
    """
    lacking = sorted(set(modules) - set(get_relative_imports(file))) if file.exists() else []
    if lacking:
        lines = [f"    from .{module} import __name__\n" for module in lacking]
        text = f"{file.read_text(encoding='utf-8')}\nif False:  # named, not imported\n"
        write_text(file, text + "".join(lines))
