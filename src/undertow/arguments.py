"""What users type into fields of the configuration: lists, addresses, `field=value`, pairs of model and SAE."""

from __future__ import annotations

from typing import Any

from undertow.errors import UndertowError


def parse_list(text: str | None, convert: type, field: str) -> list[Any] | None:
    """A comma-separated list; `None` where nothing was given.

    Raises:
        UndertowError: it is empty, or an entry is not of the type.
    """
    if text is None:
        return None
    try:
        pieces = [convert(piece.strip()) for piece in text.split(",") if piece.strip()]
        if pieces:
            return pieces
        raise ValueError
    except ValueError:
        raise UndertowError(
            f"--{field} {text!r} is not a comma-separated list of {convert.__name__} values.", "Example: 1,2,3."
        ) from None


def pairs_of_names(models: list[str] | None, saes: list[str] | None, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Names of model and SAE for each run that was asked for; `fields` must fit them all.

    Raises:
        UndertowError: numbers of models and SAEs differ, a model is named twice, or a field can be meant for one model only.
    """
    single = ("model.revision", "model.layers_path", "sae.revision", "sae.site", "sae.input_scale", "features.indices")
    own = [field for field in single if fields.get(field)]
    if saes and len(saes) != len(models or [None]):
        raise UndertowError(
            f"{len(saes)} SAEs were given for {len(models or [None])} models.", "Give one --sae for each --model, or none."
        )
    named: list[str | None] = list(models or [None])
    if len(set(named)) > 1 and own:
        raise UndertowError(f"{', '.join(own)} cannot be meant for {len(named)} models.", "Run them one by one.")
    if len(set(named)) < len(named) and not saes:
        raise UndertowError("the same model was given twice.", "Give different models, or an --sae for each.")
    return [{"model.name": m, "sae.name": s} for m, s in zip(named, saes or [None] * len(named), strict=True)]


def settings_fields(texts: list[str] | None) -> dict[str, Any]:
    """`attack.offsets=[-2,-1]` as a field and its value, read as YAML.

    Raises:
        UndertowError: a text has another form.
    """
    import yaml

    fields = {}
    for text in texts or []:
        field, equals, value = text.partition("=")
        if not equals or not field.strip():
            raise UndertowError(f"--set {text!r} is not of the form FIELD=VALUE.", "Example: --set audit.min_flips=20.")
        try:
            fields[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UndertowError(f"--set {text!r}: the value is not YAML.", "Quote it, or use a config file.") from None
    return fields


def feature_fields(text: str | None) -> dict[str, Any]:
    """`20` is a count; a list, which one index makes with a trailing comma, is the features themselves, as are addresses.

    Raises:
        UndertowError: a list that is none, an address that names no feature, or features of several SAEs.
    """
    from undertow.saes.neuronpedia import is_address, parse_address

    if text is not None and is_address(text):
        addresses = [parse_address(piece) for piece in text.split(",") if piece.strip()]
        sources = {address.sae for address in addresses}
        if len(sources) > 1:
            raise UndertowError(f"--features are of several SAEs: {', '.join(sorted(sources))}.", "Give those of one.")
        indices = [address.index for address in addresses]
        return {"features.method": "given", "features.indices": indices, "features.neuronpedia": sources.pop()}
    features = parse_list(text, int, "features")
    if features is None or text is None:
        return {}
    if "," not in text:
        return {"features.method": "attribution", "features.count": features[0], "features.indices": []}
    return {"features.method": "given", "features.indices": features}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested dictionaries, leaving out what was not given.

    Raises:
        UndertowError: a section is given both as a whole and by its fields.
    """
    fields: dict[str, Any] = {}
    for dotted, value in flat.items():
        if value is None:
            continue
        *parents, last = dotted.split(".")
        place = fields
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UndertowError(f"{parent} is given both as a whole and by its fields.", "Give one of them.")
        place[last] = value
    return fields
