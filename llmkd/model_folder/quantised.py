"""Models whose weights on disk are quantised, and the packages that can read them. No torch."""

import importlib.util
from pathlib import Path

from ..errors import UserError

#: {quantisation method in config.json: the package that transformers needs to read it, as (name to import, name to install)}.
_PACKAGES = {
    "aqlm": ("aqlm", "aqlm"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant[gpu]"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}


def refuse_quantised(folder: Path, config: dict, setting: str, again: bool) -> None:
    """UserError for a model that is quantised on disk if it is to be quantised `again`, or if its method needs a package that is not installed.

    config   the folder's config.json
    setting  the model's setting: student.model, teacher.model, ...
    """
    if not (saved := config.get("quantization_config")):
        return
    if again:
        raise UserError(
            f"{setting.removesuffix('.model')}.quantization: {folder} is quantised already; leave it out, or name the unquantised model"
        )
    method = saved.get("quant_method")
    module, package = _PACKAGES.get(method, (None, None)) if isinstance(method, str) else (None, None)
    if module and not _is_installed(module):
        raise UserError(
            f"{setting}: {folder} is quantised by {method}, which needs {package}; pip install '{package}', or name another model"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
