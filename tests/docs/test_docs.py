"""What the documentation shows works: its commands run, its policies load, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import PAGES, ROOT, Block, Page

from sandboxd.config import load_config
from sandboxd.images.recipe import Recipe
from sandboxd.policy import check_text, load_policies, shipped_policies

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

MARK = "\x00"
_NAMED = re.compile(r"# policies/([a-z_-]+\.yaml)\n")


def cases(info: str) -> list[object]:
    found = [(page, block) for page in PAGES for block in page.blocks(info)]
    assert found, f"no page has a block marked {info!r}"
    return [pytest.param(page, block, id=f"{page.name}:{block.line}") for page, block in found]


@pytest.fixture
def environment(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    if missing := [name for name in ("curl", "jq") if shutil.which(name) is None]:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have {missing}")
        pytest.skip(f"the examples need {missing}")
    binaries = Path(sys.executable).parent
    return {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "SANDBOXD_SOCKET": str(daemon.socket),
    }


def run(argv: list[str], environment: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(("page", "block"), cases("sh run"))
def test_scripts_succeed(page: Page, block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    found = run(["bash", "-euo", "pipefail", "-c", block.text], environment, tmp_path)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("page", "block"), cases("python run"))
def test_python_succeeds(page: Page, block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    found = run([sys.executable, "-W", "error", "-c", block.text], environment, tmp_path)
    assert found.returncode == 0, found.stdout


def steps(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that follows it."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif line.startswith("> ") and not found[-1][1]:
            found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def fits(expected: str, output: str) -> bool:
    """Whether an output is as shown, where ``…`` stands for anything within a line."""
    pattern = ".*".join(re.escape(part) for part in expected.rstrip("\n").split("…"))
    # People align columns and shells pad them: the ends of lines are not compared.
    shown = "\n".join(line.rstrip() for line in output.rstrip("\n").splitlines())
    return re.fullmatch(pattern, shown) is not None


@pytest.mark.parametrize(("page", "block"), cases("console run"))
def test_consoles_show_what_happens(
    page: Page, block: Block, environment: dict[str, str], tmp_path: Path
) -> None:
    wanted = steps(block.text)
    script = "".join(f"{command}\nprintf '\\0'\n" for command, _ in wanted)
    found = run(["bash", "-c", script], environment, tmp_path)
    outputs = found.stdout.split(MARK)
    assert len(outputs) == len(wanted) + 1, found.stdout
    for (command, expected), output in zip(wanted, outputs, strict=False):
        assert fits(expected, output), f"$ {command}\nshown:\n{expected}\nhappened:\n{output}"


def test_a_console_that_lies_is_noticed() -> None:
    (step,) = steps("$ echo a\n> b\nc … e\n")
    assert step == ("echo a\nb", "c … e\n")
    assert fits(step[1], "c d e   \n")
    assert fits("", "")
    assert not fits("", "c\n")
    assert not fits(step[1], "c d f\n")
    assert not fits(step[1], "c d e\nmore\n")


def test_policies_load() -> None:
    base = load_policies([shipped_policies()])
    seen = []
    for page in PAGES:
        for block in page.blocks("yaml"):
            name = _NAMED.match(block.text)
            assert name, f"{page.name}:{block.line}: say whose file it is: # policies/NAME.yaml"
            assert check_text(block.text, name[1], base) == [], f"{page.name}:{block.line}"
            seen.append(name[1])
    assert {"report.yaml", "tables.yaml", "floor.yaml", "quick.yaml"} <= set(seen)


def test_configurations_and_recipes_load(tmp_path: Path) -> None:
    loads: dict[str, Callable[[Path], object]] = {"yaml config": load_config, "yaml recipe": Recipe.load}
    for info, load in loads.items():
        blocks = [block for page in PAGES for block in page.blocks(info)]
        assert blocks, info
        for block in blocks:
            file = tmp_path / "example.yaml"
            file.write_text(block.text)
            load(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Page) -> None:
    for link in page.links():
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            assert anchor in Page(target).anchors(), f"{page.name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    pending = [ROOT / "README.md"]
    while pending:
        at = pending.pop()
        if at in reached or at.suffix != ".md" or not at.is_relative_to(ROOT):
            continue
        reached.add(at)
        links = (link.partition("#")[0] for link in Page(at).links())
        pending += [(at.parent / link).resolve() for link in links if link and "://" not in link]
    assert {page.path for page in PAGES} <= reached
