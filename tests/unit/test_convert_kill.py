"""An export that dies before any one of its changes to the disk, and is started again, ends in the same bytes.

The death is an exception that no handler catches, raised instead of the n-th rename, delete, flush or mkdir, for every
n: the disk is left as kill -9 at that moment leaves it (test_engine_kill.py does the same to training).
"""

import shutil
from pathlib import Path

import pytest

from convert import export, verify
from convert import write as files
from convert.source import open_source
from core.checkpoint.index import INDEX, SINGLE
from tests.convert_cases import checkpoint, digest, manifest_of
from tests.unit.test_engine_kill import Killed, dying_before


def command(source: Path, out: Path, to: str = "hf", size: int = 40_000) -> list[str]:
    return ["--to", to, "--from", str(source), "--out", str(out), "--shard-gb", str(size / 2**30), "--workers", "1"]


def beside(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name != out.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    return checkpoint(tmp_path / "from" / "model", "mimo", carried=True)


@pytest.mark.parametrize("to", ["hf", "mimo", "dcp"])
def test_death_before_any_change_to_the_disk(to: str, source: Path, tmp_path: Path) -> None:
    """Until the last rename there is no `out`, after it `out` is whole; the second try completes it and cleans up.

    A second try over a whole `out` is refused, and cleans up all the same.
    """
    whole = tmp_path / "whole" / "out"
    with dying_before(-1) as changes:
        assert export.main(command(source, whole, to)) == 0
    expected = without_source(whole)
    assert {"mkdir", "rename", "fsync"} <= set(changes) and len(changes) > 10
    for moment in range(0, len(changes), 7 if to == "dcp" else 1):  # dcp: torch makes dozens of changes of its own
        out = tmp_path / f"killed-{moment}" / "out"
        try:
            with dying_before(moment):
                export.main(command(source, out, to))
            raise AssertionError(f"change {moment} of {len(changes)} was not made")
        except Killed:
            pass
        where = f"{moment}: {changes[moment]}"
        if out.exists() and any(out.iterdir()):
            assert export.main(command(source, out, to)) == 2, where
        else:
            assert export.main(command(source, out, to)) == 0, where
        assert without_source(out) == expected, where
        assert beside(out) == [], where


def without_source(folder: Path) -> dict[str, str]:
    """Hashes of all files; DCP's metadata names the folder and time it was saved in, so its values are compared."""
    found = digest(folder)
    if ".metadata" in found:
        from convert.formats.dcp import read_dcp
        from convert.packer import sha256

        found = {k: v for k, v in found.items() if k != ".metadata" and not k.endswith(".distcp")}
        found |= {name: sha256(tensor) for name, tensor in read_dcp(folder)}
    return found


def test_finished_shards_are_not_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part, journal = files.Target(out).part, files.Target(out).journal
    with dying_before(-1) as changes:
        assert export.main(command(source, tmp_path / "whole")) == 0
    with pytest.raises(Killed), dying_before(len(changes) // 2):
        export.main(command(source, out))
    done = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in part.glob("*.safetensors")}
    listed = list(journal.glob("shard-*.json"))
    assert len(listed) > 1 and len(listed) in (len(done), len(done) - 1)
    first = f"model-00001-of-{len(list((tmp_path / 'whole').glob('*.safetensors'))):05}.safetensors"
    assert export.main(command(source, out)) == 0
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.safetensors")}
    kept = [n for n in sorted(done) if after[n] == done[n]]
    assert first in kept and len(kept) >= len(listed)
    assert digest(out) == digest(tmp_path / "whole")


def die_before_the_last_rename(source: Path, out: Path, to: str = "hf") -> None:
    """Every shard is written, and `out` is not there."""
    counted = out.with_name("counted")
    with dying_before(-1) as changes:
        assert export.main(command(source, counted, to)) == 0
    shutil.rmtree(counted)
    last = len(changes) - 1 - changes[::-1].index("rename")
    with pytest.raises(Killed), dying_before(last):
        export.main(command(source, out, to))
    assert not out.exists()


@pytest.mark.parametrize("to", ["hf", "dcp", "gguf"])
def test_licence_and_card_are_the_sources(to: str, source: Path, tmp_path: Path) -> None:
    """Byte for byte, as they are when the export ends, although an earlier try had copied others; gguf is one file."""
    texts = {"LICENSE": b"MIT\r\n", "NOTICE": b"of others", "README.md": "---\nlicense: mit\n---\n größer".encode()}
    for name, text in texts.items():
        (source / name).write_bytes(text)
    out = tmp_path / "out"
    die_before_the_last_rename(source, out, to)
    (source / "NOTICE").unlink()
    (source / "README.md").write_text("another card")
    assert export.main(command(source, out, to)) == 0
    found = {p.name: p.read_bytes() for p in out.iterdir() if p.name in texts}
    assert found == ({} if to == "gguf" else {"LICENSE": texts["LICENSE"], "README.md": b"another card"})
    assert verify.main([str(out), "--source", str(source)]) == 0


@pytest.mark.parametrize("changed", ["source", "options", "shards"])
def test_another_plan_starts_anew(changed: str, source: Path, tmp_path: Path) -> None:
    """Shards of one plan never end up in another's folder."""
    out = tmp_path / "out"
    die_before_the_last_rename(source, out)
    assert len(list(files.Target(out).journal.glob("shard-*.json"))) > 1
    if changed == "source":
        shutil.rmtree(source)
        checkpoint(source, "mimo", carried=True, seed=1)
    words = command(source, out, "quark" if changed == "options" else "hf", 60_000 if changed == "shards" else 40_000)
    assert export.main(words) == 0
    fresh = tmp_path / "fresh"
    assert export.main([str(fresh) if w == str(out) else w for w in words]) == 0
    assert digest(out) == digest(fresh)
    assert beside(out) == ["fresh", "from"]


def test_a_damaged_or_lost_leftover_is_made_again(source: Path, tmp_path: Path) -> None:
    """A shard in the hidden folder that is shorter than planned, or whose journal entry is no JSON, is not kept."""
    assert export.main(command(source, tmp_path / "whole")) == 0
    for number, damage in enumerate(("short", "gone", "journal")):
        out = tmp_path / f"out-{number}"
        die_before_the_last_rename(source, out)
        target = files.Target(out)
        shard = sorted(target.part.glob("*.safetensors"))[0]
        if damage == "short":
            shard.write_bytes(shard.read_bytes()[:-10])
        elif damage == "gone":
            shard.unlink()
        else:
            sorted(target.journal.glob("shard-*.json"))[0].write_text('{"hashes": {')
        assert export.main(command(source, out)) == 0, damage
        assert digest(out) == digest(tmp_path / "whole"), damage


def test_the_result_opens(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main(command(source, out)) == 0
    assert (out / INDEX).exists() and not (out / SINGLE).exists()
    assert {i.name for i in open_source(out).quantised} == {
        n for n, e in manifest_of(out)["tensors"].items() if e["quantised"]
    }
