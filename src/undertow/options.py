"""The options that commands share, grouped in the panels in which `--help` shows them."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

MODEL, SAE, CLAMP, ATTACK, RUN = "Model", "SAE and features", "Clamp", "Attack", "Run"
MODEL_HELP = "packaged name, hub id, local folder, or GGUF file (default: smollm2)"
SAE_HELP = "packaged name, local folder, release/id, or hub id/folder (default: packaged)"


def option(*names: str, help: str, panel: str, **more: Any) -> Any:
    """An option of a command, in a panel of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[Optional[str], option(help=MODEL_HELP, panel=MODEL)]
SAEName = Annotated[Optional[str], option("--sae", help=SAE_HELP, panel=SAE)]
Models = Annotated[
    Optional[list[str]], option("--model", help=f"{MODEL_HELP}; again for a second model", panel=MODEL, metavar="<str>")
]
SAENames = Annotated[Optional[list[str]], option("--sae", help=f"{SAE_HELP}; one for each model", panel=SAE, metavar="<str>")]
Revision = Annotated[Optional[str], option(help="hub revision of the model", panel=MODEL)]
SAERevision = Annotated[Optional[str], option(help="hub revision of the SAE", panel=SAE)]
Site = Annotated[Optional[str], option(help="overrides the SAE's own hook point: blocks.15.hook_resid_post", panel=SAE)]
LayersPath = Annotated[
    Optional[str], option(help="where an unusual architecture keeps its blocks, e.g. model.blocks", panel=MODEL)
]
PrependBos = Annotated[
    Optional[bool],
    option("--prepend-bos/--no-prepend-bos", help="BOS before texts if the tokenizer adds none (default: as the SAE says)",
            panel=MODEL),
]  # fmt: skip
CentreInput = Annotated[
    Optional[bool],
    option("--centre-input/--raw-input", help="the SAE reads mean-centred residuals (default: as its config says)", panel=SAE),
]
InputScale = Annotated[
    Optional[float], option(help="factor on the stream before encoding, where the SAE's files leave it open", panel=SAE)
]
Device = Annotated[Optional[str], option(help="torch device, or auto to spread layers over all (default: cpu)", panel=MODEL)]
Dtype = Annotated[Optional[str], option(help="float32, bfloat16 or float16 (default: float32)", panel=MODEL)]
Threads = Annotated[Optional[int], option(help="CPU threads (default: one for each core)", panel=RUN, min=1)]
AsJson = Annotated[bool, option("--json", help="machine-readable output on stdout", panel=RUN)]
