"""``sandboxd image …``: works on the store itself, as root, whether a daemon runs or not.

The store locks what it changes, so that this is safe beside a running daemon.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.daemon import ConfigFile  # noqa: TC001 - cyclopts evaluates annotations
from sandboxd.cli.options import FORMAT, Format
from sandboxd.cli.policy import load

if TYPE_CHECKING:
    from sandboxd.config import Config
    from sandboxd.engine.docker import DockerImages
    from sandboxd.images import Image, ImageStore

__all__ = ["build", "import_image", "ls", "pull", "rm", "verify"]

FlatFormat = Annotated[Format, Parameter(name="*")]
State = Annotated[Path | None, Parameter(help="The state directory, before the configuration's.")]
Name = Annotated[str, Parameter(help="The image's name, or its digest (sha256:…).")]
_ARCHIVE = re.compile(r"(\.(tar|tgz|txz|oci|gz|xz|bz2|zst))+$")


def _settings(config: Path | None) -> Config:
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it

    return load_config(config)


def _store(config: Path | None, state: Path | None, *, make: bool = False) -> ImageStore:
    """The store; a state directory that is named and not there is only made by what fills it."""
    from sandboxd.images import ImageStore  # noqa: PLC0415 - `--help` must not pay for it

    if state is not None and not make and not state.is_dir():
        raise errors.NotFound(f"there is no state directory {state}")
    settings = _settings(config)
    where = state or settings.state
    try:
        return _of_docker(settings, where) if settings.engine == "docker" else ImageStore(where / "images")
    except PermissionError:
        raise errors.NotPermitted(f"no permission for {where}/images: image commands run as root") from None


def _of_docker(settings: Config, state: Path) -> DockerImages:
    """The store with the images of the configuration's Docker Engine."""
    from sandboxd.engine.docker import DockerEndpoint, DockerImages  # noqa: PLC0415 - as above
    from sandboxd.engine.host import instance_name  # noqa: PLC0415

    endpoint = DockerEndpoint(settings.docker.socket, timeout=settings.docker.timeout / 1e6)
    return DockerImages(state, endpoint, instance_name(state))


def _made(image: Image, output: Format) -> None:
    if output.json:
        terminal.print_json(
            {
                "name": image.name,
                "digest": image.digest,
                "size": image.size,
                "created": image.created,
                "source": image.source,
                "architecture": image.architecture,
            }
        )
    else:
        terminal.print_text(f"{image.name}  {image.digest}  {image.size / 2**20:.1f} MiB")


def build(
    recipe: Annotated[
        str, Parameter(help="A recipe file, or the name of a shipped one: base, python, build.")
    ],
    *,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> None:
    """Build an image from a recipe with mmdebstrap; progress is on stderr."""
    from sandboxd.images import shipped_recipes  # noqa: PLC0415 - `--help` must not pay for it

    path = Path(recipe)
    if "/" not in recipe and not path.exists():
        shipped = shipped_recipes()
        path = shipped / f"{recipe}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(one.stem for one in shipped.glob("*.yaml")))
            raise errors.NotFound(f"there is no recipe {recipe!r}; name a file, or one of: {known}")
    _made(_store(config, state, make=True).build(path, progress=terminal.complain), output)


def import_image(
    source: Annotated[Path, Parameter(help="What `docker save` or `docker export` wrote, or an OCI layout.")],
    *,
    name: Annotated[str | None, Parameter(help="The image's name; else that of the file.")] = None,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> None:
    """Import an image from a tar (compressed or not) or an OCI layout; its kind is seen from its content."""
    own = name or _ARCHIVE.sub("", source.name)
    _made(_store(config, state, make=True).import_(source, name=own), output)


def pull(
    reference: Annotated[str, Parameter(help="The image in its registry, such as docker://debian:12.")],
    *,
    name: Annotated[str | None, Parameter(help="The image's name; else that of the reference.")] = None,
    update: Annotated[
        bool,
        Parameter(negative="", help="With `engine: docker`, have the reference stand for what it names now."),
    ] = False,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> None:
    """Fetch an image from a registry: with skopeo, or, with `engine: docker`, by the Docker Engine."""
    settings = _settings(config)
    if settings.engine != "docker":
        _made(_store(config, state, make=True).pull(reference, name=name), output)
        return
    if name is not None:
        raise errors.InvalidRequest(
            "the Docker Engine keeps an image under its reference, which a policy names as `image:`; "
            "leave --name out",
            field="name",
        )
    images = _of_docker(settings, state or settings.state)
    wanted = reference.removeprefix("docker://")
    _made(images.fetch(wanted, update=update, progress=terminal.complain), output)


def ls(*, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """List the images in the store, with the policies that use them."""
    users = _users(config)
    images = [
        one.model_copy(update={"used_by": sorted({*users.get(one.name, []), *users.get(one.digest, [])})})
        for one in _store(config, state).list()
    ]
    if output.json:
        terminal.print_json({"images": [terminal.wire(image) for image in images]})
        return
    rows = [
        (
            one.name,
            one.digest.removeprefix("sha256:")[:12],
            f"{one.size / 2**20:.1f} MiB",
            terminal.age(one.created) if one.created else "-",
            one.source,
            ", ".join(one.used_by),
        )
        for one in images
    ]
    empty = "no images yet: `sandboxd image build base`"
    terminal.print_rows(("NAME", "DIGEST", "SIZE", "AGE", "SOURCE", "USED BY"), rows, empty=empty)


def verify(
    names: Annotated[list[str] | None, Parameter(help="The images to verify; else all.")] = None,
    /,
    *,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> int:
    """Compute the digests of images again; exit status 1 if a file differs."""
    store = _store(config, state)
    wanted = names or [image.name for image in store.list() if image.name != "host"]
    differing = {name: store.verify(name) for name in wanted}
    if output.json:
        terminal.print_json({"images": differing})
    else:
        for name, paths in differing.items():
            terminal.print_text(f"{name}: {f'{len(paths)} paths differ' if paths else 'as recorded'}")
            for path in paths[:100]:
                terminal.print_text(f"  {path}")
    return 1 if any(differing.values()) else 0


def rm(name: Name, *, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """Remove an image by its name or digest; one that a policy or a running call uses is kept."""
    _store(config, state).remove(name, users=_users(config))
    if output.json:
        terminal.print_json({"removed": name})


def _users(config: Path | None) -> dict[str, list[str]]:
    """The names of the policies that use each image, by the name or digest that they write."""
    policies = load(config)
    users: dict[str, list[str]] = {}
    for name in policies.names():
        users.setdefault(policies.get(name).image, []).append(name)
    return users
