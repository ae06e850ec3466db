"""Data and recipes that are small and become large, or take for ever: one sentence soon, in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.data import text_files
from finetune.data.readers import local_rows
from finetune.data.text_files import opened
from finetune.errors import InputError
from finetune.recipe.load import load_recipe
from finetune.utils import limits
from finetune.utils.safetensors_io import read_file
from tests.report.made_run import RUN, MadeRun
from tests.security.conftest import Command, roots
from tests.security.test_untrusted_base import plain as plain
from tests.security.test_untrusted_base import refused

SECONDS = 20.0
Pack = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Every case ends within seconds of work."""
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 MB at most, so that a test need not make larger ones."""
    from finetune.data import json_files, readers

    for module in (text_files, json_files, readers):
        monkeypatch.setattr(module, "MOST_ROW_BYTES", 1_000_000)


def packed(path: Path, content: bytes) -> Path:
    """Write a file, packed as its name says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content, 1))
    elif path.suffix == ".zst":
        zstd = pytest.importorskip("backports.zstd")
        path.write_bytes(zstd.compress(content))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("a.jsonl", b'{"text": "', b'"}\n'), ("a.json", b'[{"text": "', b'"}]'), ("a.csv", b'text\n"', b'"\n'),
        ("b.json", b'{"rows": [{"text": "', b'"}]}'),
    ],
)  # fmt: skip
def test_a_row_without_end_is_refused(name: str, begin: bytes, end: bytes, ending: str, tmp_path: Path) -> None:
    noise = os.urandom(500_000).hex().encode()
    path = packed(tmp_path / f"{name}{ending}", begin + noise * 4 + end)
    with pytest.raises(InputError, match="without end"):
        list(local_rows(path))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_line_without_end_in_another_encoding_is_refused(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(('{"text": "' + "x" * 2_000_000 + '"}\n').encode(encoding))
    with pytest.raises(InputError, match="without end"):
        list(local_rows(tmp_path / "a.jsonl", encoding))


@pytest.mark.usefixtures("small")
def test_a_csv_field_over_many_lines_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text\n"' + b"line\n" * 400_000 + b'"\n')
    with pytest.raises(InputError, match="field limit"):
        list(local_rows(tmp_path / "a.csv"))


@pytest.mark.usefixtures("small")
def test_rows_of_the_largest_size_are_read(tmp_path: Path) -> None:
    text = "x" * 900_000
    (tmp_path / "a.jsonl").write_text('{"text": "' + text + '"}\n{"text": "b"}\n{"text": "c"}')
    rows = [r.row for r in local_rows(tmp_path / "a.jsonl")]
    assert rows == [{"text": text}, {"text": "b"}, {"text": "c"}]
    (tmp_path / "a.json").write_text('[{"text": "' + text + '"}, {"text": "b"}]')
    assert [r.row for r in local_rows(tmp_path / "a.json")] == rows[:2]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_bomb_of_many_short_lines_is_refused(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "UNPACKED_BYTES", 500_000)
    path = packed(tmp_path / f"{name}{ending}", b"\n" * 3_000_000)
    with pytest.raises(InputError, match="unpacks to more than 100 times its size"):
        list(local_rows(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_repetitive_rows_of_a_usual_size_are_read(ending: str, tmp_path: Path) -> None:
    path = packed(tmp_path / f"a.jsonl{ending}", b'{"text": "the same row"}\n' * 20_000)
    assert sum(r.row is not None for r in local_rows(path)) == 20_000


def test_a_zstd_file_is_unpacked_in_pieces(tmp_path: Path) -> None:
    """Given at once, 128 kB of it may become 4 GB."""
    path = packed(tmp_path / "a.zst", bytes(400_000_000))
    tracemalloc.start()
    with opened(path) as stream:
        total = sum(iter(lambda: len(stream.read(1 << 20)), 0))
    assert total == 400_000_000 and tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()


def test_200_000_columns_take_linear_time(tmp_path: Path) -> None:
    count = 200_000
    header = ",".join(f"c{i}" for i in range(count))
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join('x' * count)}\n" + "a,b\n" * 2000)
    rows = list(local_rows(tmp_path / "a.csv"))
    assert rows[0].row is not None and len(rows[0].row) == count
    assert len(rows[1].problem) < 500
    (tmp_path / "b.csv").write_text(f"{header},c7\n")
    with pytest.raises(InputError, match="two columns 'c7'"):
        list(local_rows(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    "extra",
    [
        "".join(f"k{i}: {i}\n" for i in range(1_000_000)),
        "lora: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n",
        "x: " + "[" * 50_000 + "\n",
        "seed: " + "9" * 90_000 + "\n",
        "x: &a [1,1]\n" + "".join(f"y{i}: &b{i} [*a,*a]\n" for i in range(2000)),
    ],
    ids=["keys", "nested", "open", "number", "aliases"],
)
def test_a_recipe_without_end_is_refused(extra: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"schema: 1\nname: r\nmodel: builtin:tiny-mistral\ndata: [{{source: pydoc}}]\n{extra}")
    with pytest.raises(InputError) as caught:
        load_recipe(str(path), [])
    assert len(str(caught.value)) < 30_000


def test_a_recipe_that_is_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe(str(tmp_path / "r.yaml"), [])


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "../latest", "manifest"])
def test_a_record_of_hundreds_of_megabytes_is_not_read(name: str, made: MadeRun, finetune: Command) -> None:
    folder = made.store.artifacts / "runs" / "made" / RUN
    path = made.folder("dedup") / "manifest.json" if name == "manifest" else folder / name
    with path.open("r+b") as file:
        file.truncate(1 << 28)
    for words in ("show made", "report made", "clean", "runs"):
        with limits.memory(1 << 29):
            ended = finetune(*words.split(), *roots(made))
        assert ended.status in (0, 2) and "Traceback" not in ended.err and len(ended.err) < 3000, ended


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json",
                                  "model.safetensors.index.json", "tokenizer.model", "model.safetensors"])  # fmt: skip
def test_a_file_of_a_base_of_hundreds_of_megabytes_is_one_sentence(name: str, plain: Path, tmp_path: Path) -> None:
    """model.safetensors says that its header has 10⁹ bytes."""
    model = Path(shutil.copytree(plain, tmp_path / "model"))
    with (model / name).open("r+b" if (model / name).exists() else "wb") as file:
        if name == "model.safetensors":
            file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 << 30 if name == "model.safetensors" else 1 << 28)
    if name == "model.safetensors":
        with pytest.raises(InputError, match="not a safetensors file"):
            read_file(model / name)
    else:
        with limits.memory(1 << 30):
            refused(model, tmp_path, name)


@pytest.mark.parametrize("ending", [".xz", ".bz2", ".zip", ".gz", ".zst", ""])
@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress, lambda b: gzip.compress(gzip.compress(b))])
def test_rows_packed_otherwise_or_twice_are_one_sentence(ending: str, pack: Pack, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(b'{"text": "a"}\n' * 3000))
    with pytest.raises(InputError) as caught:
        for row in local_rows(tmp_path / f"a.jsonl{ending}"):
            assert row.row is None
        raise InputError("every row is left out, with a reason")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def limited(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which may use 2 GB."""
    head = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30,) * 2)\n"
    return subprocess.run([sys.executable, "-P", "-c", head + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("work", ["'a' * 10**9", "list(range(10**9))", "'{:>1000000000}'.format('a')"])
def test_work_that_takes_too_much_memory_is_stopped_in_this_process(work: str) -> None:
    done = limited(
        "from finetune.utils.limits import bounded\nfrom finetune.errors import InputError\n"
        f"try:\n    with bounded('x', cpu_seconds=30, memory_bytes=200_000_000): {work}\n"
        "except InputError as error: print(error)\nprint(len('b' * 10**9))"
    )
    assert done.stdout == "x: needs more than 0.2 GB of memory to read; is it the right file?\n1000000000\n", (
        done.stderr
    )


def test_work_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(InputError, match=r"x: needs more than 0\.2 s of CPU time"):
        with limits.bounded("x", cpu_seconds=0.2, memory_bytes=10**9):
            while True:
                try:
                    sum(range(1000))
                except Exception:
                    continue


def test_work_within_its_bounds_is_left_alone() -> None:
    with limits.bounded("x", cpu_seconds=5, memory_bytes=10**9):
        assert len("a" * 10**6) == 10**6


def test_native_work_that_ends_is_left_alone_and_its_errors_are_its_own() -> None:
    assert limits.watched(lambda: 3, seconds=5, memory_bytes=10**9) == 3
    with pytest.raises(KeyError, match="a"):
        limits.watched(lambda: {}["a"], seconds=5, memory_bytes=10**9)


def test_native_work_without_end_is_left_to_itself() -> None:
    """It counts the lesser of clock and CPU time: one that only waits is waited for."""
    end = time.monotonic() + 1.5
    with pytest.raises(TimeoutError, match="within 0 s"):
        limits.watched(lambda: [hashlib.sha256(bytes(10**7)) for _ in iter(lambda: time.monotonic() < end, False)],
                       seconds=0.2, memory_bytes=10**9)  # fmt: skip
    while time.monotonic() < end + 0.2:
        time.sleep(0.05)
    assert limits.watched(lambda: time.sleep(0.4), seconds=0.2, memory_bytes=10**9) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_native_work_that_takes_all_memory_is_left_to_itself() -> None:
    with pytest.raises(MemoryError, match=r"more than 0\.1 GB"):
        limits.watched(lambda: (bytes(200_000_000), time.sleep(3)), seconds=5, memory_bytes=10**8)


def test_the_disk_and_signals_are_no_fault_of_a_file() -> None:
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), limits.reading("x"):
            raise error
    with pytest.raises(InputError, match="x: KeyError: 'a'"), limits.reading("x"):
        raise KeyError("a")
