"""Finding an SAE by what the user typed, and reading it whatever library wrote it.

A name means, in this order: an SAE packaged with undertow; a folder, or a weights file in one; a release of SAELens's registry
(`gpt2-small-res-jb/blocks.8.hook_resid_pre`, when sae-lens is installed: only its list of releases is read, none of its code
runs); a folder on the hub (`org/repository/folder`). The format is recognised by the name of the weights file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from undertow.cache import sha256_of
from undertow.errors import UndertowError
from undertow.models.language_model import LanguageModel
from undertow.saes.files import refuse_pickle
from undertow.saes.formats.base import FORMATS, recognise
from undertow.saes.formats.saelens import CONFIG
from undertow.saes.sae import SAE
from undertow.saes.stored import Overrides, canonical
from undertow.sites import Site

HUB_FOLDER = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)+")


@dataclass(frozen=True)
class Located:
    """What a name means.

    Attributes:
        folder: where its files are, or will be once fetched from the hub.
        file: the weights file in it, where the user named one.
        on_hub: repository on the hub and folder in it, if it has to be fetched from there.
        config: fields that a registry of releases sets in the SAE's own configuration.
        known: what else it says about it.
    """

    folder: Path
    file: str | None = None
    on_hub: tuple[str, str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    known: Overrides = field(default_factory=Overrides)


def packaged_saes() -> dict[str, Path]:
    """Packaged SAEs by name, `model/site`, from shallow to deep."""
    root = Path(str(resources.files("undertow") / "data" / "saes"))
    folders = [path.parent for path in root.glob(f"*/*/{CONFIG}")]
    folders.sort(key=lambda folder: (folder.parent.name, Site.parse(folder.name)))
    return {f"{folder.parent.name}/{folder.name}": folder for folder in folders}


def default_sae(model_name: str) -> str:
    """The middle one of the SAEs packaged for a model, the lower one of an even number.

    Raises:
        UndertowError: none is packaged for it.
    """
    names = [name for name in packaged_saes() if name.split("/")[0] == model_name]
    if not names:
        raise UndertowError(f"no SAE is packaged for model {model_name!r}.", "Name one with --sae FOLDER.")
    return names[(len(names) - 1) // 2]


def read_sae(name: str | None, model_name: str, *, revision: str | None = None, **overrides: Any) -> SAE:
    """An SAE from its files, on the CPU, before any model is loaded.

    Args:
        name: packaged name such as `smollm2/blocks.15.hook_resid_post`, a folder or weights file in a known format,
            `release/sae_id` of SAELens's registry, or `org/repository/folder` on the hub; `None` for the packaged default
            of the model.
        model_name: the model that it is for.
        revision: revision on the hub.
        overrides: fields of `saes.stored.Overrides`: `site`, `centre_input`, `input_scale`.

    Raises:
        UndertowError: it cannot be found or read.
    """
    name = name or default_sae(model_name)
    located = _locate(name)
    folder = _folder_of(name, located, revision)
    given = {key: value for key, value in overrides.items() if value is not None}
    form = recognise(folder, located.file)
    try:
        return canonical(form.read(folder, located.config), name, replace(located.known, **given))
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise UndertowError(
            f"{folder} is no sound SAE in {form.name}'s format: {error}.", "Fetch its configuration again."
        ) from error


def fitted(sae: SAE, model: LanguageModel) -> SAE:
    """The SAE on the device of its site, if it is of the model's width and at a site that the model has.

    Raises:
        UndertowError: it is not, or it is centred and the model one that TransformerLens does not centre.
    """
    sae.site.check(model.n_layers)
    if sae.d_model != model.d_model:
        raise UndertowError(
            f"SAE {sae.name} reads a residual stream of width {sae.d_model}, model {model.name} has {model.d_model}.",
            "They do not belong together; choose an SAE that was trained on this model.",
        )
    if sae.centred and not any(isinstance(module, nn.LayerNorm) for module in model.layers[0].modules()):
        raise UndertowError(
            f"SAE {sae.name} is said to read mean-centred residuals, but {model.name} has no layer norms, and "
            "TransformerLens centres nothing in such a model.",
            "Pass --raw-input.",
        )
    return sae.to(model.device_at(sae.site))


def load_sae(name: str | None, model: LanguageModel, **overrides: Any) -> SAE:
    """`read_sae` for a model that is there, and `fitted` to it.

    Raises:
        UndertowError: it cannot be found or read, or does not fit the model.
    """
    return fitted(read_sae(name, model.name, **overrides), model)


def check_sae_name(name: str | None, model_name: str) -> None:
    """Refuse an SAE that cannot be found, before any model is loaded.

    Raises:
        UndertowError: as `load_sae` does.
    """
    _locate(name or default_sae(model_name))


def sae_fingerprint(name: str | None, model_name: str, revision: str | None = None) -> str:
    """What tells this SAE from another under the same name: a digest of its weights, configuration, and what a registry adds.

    Raises:
        UndertowError: it cannot be found.
    """
    name = name or default_sae(model_name)
    located = _locate(name)
    folder = _folder_of(name, located, revision)
    form = recognise(folder, located.file)
    files = [folder / file for file in (form.weights, *form.others) if (folder / file).is_file()]
    digests = [f"{file.name}:{sha256_of(file)}" for file in files]
    return hashlib.sha256(repr((digests, located.config, located.known)).encode()).hexdigest()


def _folder_of(name: str, located: Located, revision: str | None) -> Path:
    if revision and not located.on_hub:
        raise UndertowError(f"revision {revision!r} of SAE {name!r}: only SAEs on the hub have revisions.", "Leave it out.")
    return _fetch(name, *located.on_hub, revision) if located.on_hub else located.folder


def _locate(name: str) -> Located:
    if name in packaged_saes():
        return Located(packaged_saes()[name])
    path = Path(name).expanduser()
    if os.path.isdir(path):
        return Located(path)
    if os.path.isfile(path):
        refuse_pickle(path)
        return Located(path.parent, path.name)
    release, _, sae_id = name.partition("/")
    if sae_id and release in _release_names():
        return _of_release(release, sae_id)
    if HUB_FOLDER.fullmatch(name) and not name.startswith("."):
        organisation, repository, folder = name.split("/", 2)
        return Located(path, on_hub=(f"{organisation}/{repository}", folder))
    hint = "" if _registry_file() else " Releases of SAELens's registry (release/sae_id) need sae-lens to be installed."
    raise UndertowError(
        f"SAE {name!r} is not a folder.",
        f"Pass a folder or weights file, org/repository/folder on the hub, or one of: "
        f"{', '.join(packaged_saes()) or 'none packaged'}.{hint}",
    )


def _fetch(name: str, repository: str, folder: str, revision: str | None) -> Path:
    """The SAE's files from the hub or, offline, from the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    formats = [FORMATS.get(known) for known in FORMATS.names()]
    files = sorted({f"{folder}/{file}" for known in formats for file in (known.weights, *known.others)})
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files)) / folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UndertowError(
            f"SAE {name!r} cannot be fetched from the hub: {reason}", "Check the address, or pass a local folder."
        ) from error


def _registry_file() -> Path | None:
    """SAELens's list of releases, if that package is installed; finding it imports nothing of it."""
    found = importlib.util.find_spec("sae_lens")
    return Path(found.origin).parent / "pretrained_saes.yaml" if found and found.origin else None


@cache
def _release_names() -> frozenset[str]:
    """Names of all releases: the keys at the left margin of the list, which is long and slow to parse as a whole."""
    file = _registry_file()
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
    return frozenset(line.partition(":")[0] for line in lines if line[:1] not in ("", " ", "#", "-"))


def _of_release(release: str, sae_id: str) -> Located:
    file = _registry_file()
    assert file is not None
    entry = _release_entry(file, release)
    found = {str(sae["id"]): sae for sae in entry.get("saes", [])}
    if sae_id not in found:
        some = ", ".join(list(found)[:4])
        raise UndertowError(f"release {release} has no SAE {sae_id!r}.", f"It has {len(found)}, among them {some}.")
    sae = found[sae_id]
    overrides = {**(entry.get("config_overrides") or {}), **(sae.get("config_overrides") or {})}
    known = Overrides(
        release_scale=sae.get("norm_scaling_factor"), neuronpedia=sae.get("neuronpedia"),
    )  # fmt: skip
    where = (str(entry["repo_id"]), str(sae["path"]))
    return Located(Path(where[1]), on_hub=where, config=overrides, known=known)


def _release_entry(file: Path, release: str) -> dict[str, Any]:
    """One release out of the list, without parsing the others."""
    lines = file.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"{release}:"))
    last = next((n for n in range(first + 1, len(lines)) if lines[n][:1] not in ("", " ", "#", "-")), len(lines))
    return yaml.safe_load("\n".join(lines[first:last]))[release]
