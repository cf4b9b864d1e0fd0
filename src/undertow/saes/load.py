"""Finding an SAE by what the user typed: a packaged name, a local folder, or a hub id with the folder inside it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from undertow.errors import UndertowError
from undertow.models.language_model import LanguageModel
from undertow.saes.sae import SAE
from undertow.saes.saelens import CONFIG, WEIGHTS, load_saelens
from undertow.sites import Site


def packaged_saes() -> dict[str, Path]:
    """Packaged SAEs by name, `model/site`, from shallow to deep."""
    root = Path(str(resources.files("undertow") / "data" / "saes"))
    folders = [path.parent for path in root.glob(f"*/*/{CONFIG}")]
    folders.sort(key=lambda folder: (folder.parent.name, Site.parse(folder.name)))
    return {f"{folder.parent.name}/{folder.name}": folder for folder in folders}


def default_sae(model_name: str) -> str:
    """The middle one of the SAEs packaged for a model.

    Raises:
        UndertowError: none is packaged for it.
    """
    names = [name for name in packaged_saes() if name.split("/")[0] == model_name]
    if not names:
        raise UndertowError(f"no SAE is packaged for model {model_name!r}.", "Name one with --sae FOLDER.")
    return names[len(names) // 2]


def read_sae(name: str | None, model_name: str, *, site: str | None = None, centre_input: bool = False) -> SAE:
    """An SAE from its files, on the CPU, before any model is loaded.

    Args:
        name: packaged name such as `smollm2/blocks.15.hook_resid_post`, a folder in SAELens's format, or
            `org/repository/folder` on the hub; `None` for the packaged default of the model.
        model_name: the model that it is for.
        site: address that overrides the one in its configuration.
        centre_input: see `load_saelens`.

    Raises:
        UndertowError: it cannot be found or read.
    """
    name = name or default_sae(model_name)
    return load_saelens(locate_sae(name), name, site=site, centre_input=centre_input)


def fitted(sae: SAE, model: LanguageModel) -> SAE:
    """The SAE on the model's device, if it is of the model's width and at a site that the model has.

    Raises:
        UndertowError: it is not.
    """
    sae.site.check(model.n_layers)
    if sae.d_model != model.d_model:
        raise UndertowError(
            f"SAE {sae.name} reads a residual stream of width {sae.d_model}, model {model.name} has {model.d_model}.",
            "They do not belong together; choose an SAE that was trained on this model.",
        )
    return sae.to(model.device)


def load_sae(name: str | None, model: LanguageModel, *, site: str | None = None, centre_input: bool = False) -> SAE:
    """`read_sae` for a model that is there, and `fitted` to it.

    Raises:
        UndertowError: it cannot be found or read, or does not fit the model.
    """
    return fitted(read_sae(name, model.name, site=site, centre_input=centre_input), model)


def check_sae_name(name: str | None, model_name: str) -> None:
    """Refuse an SAE that cannot be found, before any model is loaded.

    Raises:
        UndertowError: as `load_sae` does.
    """
    locate_sae(name or default_sae(model_name), dry=True)


def locate_sae(name: str, dry: bool = False) -> Path:
    """The folder that a name means, fetched from the hub where it means one there, unless `dry`.

    Raises:
        UndertowError: it means nothing that can be found.
    """
    if name in packaged_saes():
        return packaged_saes()[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)+", name) and not path.exists() and not name.startswith("."):
        return path if dry else _from_hub(name)
    raise UndertowError(
        f"SAE {name!r} is not a folder.",
        f"Pass a folder in SAELens's format, org/repository/folder on the hub, or one of: "
        f"{', '.join(packaged_saes()) or 'none packaged'}.",
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    organisation, repository, folder = name.split("/", 2)
    try:
        files = [hf_hub_download(f"{organisation}/{repository}", f"{folder}/{file}") for file in (CONFIG, WEIGHTS)]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UndertowError(
            f"SAE {name!r} cannot be fetched from the hub: {reason}", "Check the address, or pass a local folder."
        ) from error
    return Path(files[0]).parent
