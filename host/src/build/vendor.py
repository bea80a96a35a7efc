"""Vendors an app's requirements for the guest: CPython on WASI, pure Python.

Run by the interpreter of the private virtual environment, with the pip that is
pinned there. pip resolves and downloads; this script makes it resolve for the
guest and not for this machine, prefers wheels, builds source distributions
without compilers, and unpacks the wheels itself, so that the result has no
scripts, no native code and no trace of this machine.

A JSON object on standard input says what to do:

    requirements  the requirements file, or null
    label         what messages call that file if it is a stand-in, or null
    directory     relative paths in the requirements start here
    target        where the packages go; empty, or not there yet
    report        where the result goes, as JSON: `packages` or `error`
    native        names of packages that are known to need native code

Lines on standard output are progress. The status is 0 whenever there is a
report; anything else is a fault of ours, with a traceback on standard error.

pip's modules are private to pip: each patch below is right for the pinned
version, which is why that version is pinned.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import email.parser
import fnmatch
import io
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

from pip._internal.cli import req_command
from pip._internal.cli.req_command import with_cleanup
from pip._internal.commands.wheel import WheelCommand
from pip._internal.exceptions import (
    DiagnosticPipError,
    DistributionNotFound,
    InstallationError,
    InstallationSubprocessError,
    PipError,
    UnsupportedWheel,
)
from pip._internal.distributions.sdist import SourceDistribution
from pip._internal.index import collector
from pip._internal.index.package_finder import (
    CandidateEvaluator,
    LinkEvaluator,
    LinkType,
)
from pip._internal.models.target_python import TargetPython
from pip._internal.models.wheel import Wheel
from pip._internal.operations.build.build_tracker import get_build_tracker
from pip._internal.operations.prepare import RequirementPreparer
from pip._internal.req.req_install import InstallRequirement
from pip._internal.resolution.resolvelib import factory, resolver
from pip._internal.utils.misc import redact_auth_from_url
from pip._internal.utils.temp_dir import TempDirectory
from pip._internal.wheel_builder import _build_one
from pip._vendor import tomli
from pip._vendor.packaging import markers
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

# What the guest's interpreter says of itself.
GUEST_VERSION = (3, 14, 0)
GUEST_MARKERS = {
    "implementation_name": "cpython",
    "implementation_version": "3.14.0",
    "os_name": "posix",
    "platform_machine": "wasm32",
    "platform_release": "0.0.0",
    "platform_system": "wasi",
    "platform_version": "0.0.0",
    "python_full_version": "3.14.0",
    "platform_python_implementation": "CPython",
    "python_version": "3.14",
    "sys_platform": "wasi",
}
# The platform tag that builders of wheels for WASI use. PyPI has none of them,
# a private index may.
GUEST_PLATFORM = "wasi_0_0_0_wasm32"

# Files that only native code is in.
NATIVE = re.compile(r"\.(so(\.[0-9.]+)?|pyd|dll|dylib)$", re.IGNORECASE)
# Parts of *.dist-info that tell of this machine or of files that we leave out.
UNWANTED_METADATA = {
    "INSTALLER",
    "RECORD",
    "RECORD.jws",
    "RECORD.p7s",
    "REQUESTED",
    "WHEEL",
    "direct_url.json",
}

# What a compiler says when a build calls one; see `without_compilers`.
NO_COMPILER = "wsgi-wasm builds packages without compilers"
COMPILERS = (
    "c++ c89 c99 cargo cc clang clang++ cl g++ gcc gfortran go ld nvcc rustc rustup "
    "mysql_config pg_config"
).split()
NEEDS_COMPILER = re.compile(
    re.escape(NO_COMPILER)
    + r"|(unknown|no acceptable|working|compatible|missing) ([a-z+]+ )?compiler"
    + r"|rust (compiler|toolchain)|microsoft visual c\+\+|pg_config|mysql_config",
    re.IGNORECASE,
)
# How setup scripts of well-known packages are told to leave out their
# optional accelerators. Most others try, fail and go on without.
PURE_SWITCHES = {
    "AIOHTTP_NO_EXTENSIONS": "1",
    "BUILD_EXTENSION": "no",
    "CASS_DRIVER_NO_EXTENSIONS": "1",
    "CHARSET_NORMALIZER_USE_MYPYC": "0",
    "COVERAGE_DISABLE_EXTENSION": "1",
    "DISABLE_SPEEDUPS": "1",
    "DISABLE_SQLALCHEMY_CEXT": "1",
    "FALCON_DISABLE_CYTHON": "Y",
    "FROZENLIST_NO_EXTENSIONS": "1",
    "MSGPACK_PUREPYTHON": "1",
    "MULTIDICT_NO_EXTENSIONS": "1",
    "MYPYC_OPT_LEVEL": "0",
    "PROPCACHE_NO_EXTENSIONS": "1",
    "PYRSISTENT_SKIP_EXTENSION": "1",
    "PYYAML_FORCE_CYTHON": "0",
    "PYYAML_FORCE_LIBYAML": "0",
    "SKIP_CYTHON": "1",
    "TORNADO_EXTENSION": "0",
    "WRAPT_DISABLE_EXTENSIONS": "1",
    "WRAPT_INSTALL_EXTENSIONS": "false",
    "YARL_NO_EXTENSIONS": "1",
}
# Build backends that make nothing but native code.
NATIVE_BACKENDS = {"maturin"}

# Not copied with a local package: old results of setuptools, which would end up
# in the new one, and large things that are never part of a package.
STALE = {"build", "*.egg-info"}
BULKY = {".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__", ".mypy_cache"}


class Refusal(Exception):
    """A requirement that can not be vendored, as the report's `error`."""

    def __init__(self, kind: str, requirement: InstallRequirement, **facts) -> None:
        """Tells of `requirement` what is known: name, version, who wants it."""
        super().__init__(f"{kind}: {requirement}")
        required_by, origin = wanted_by(requirement)
        link = requirement.link.url_without_fragment if requirement.link else None
        self.report = {
            "kind": kind,
            "name": canonicalize_name(requirement.name or str(link)),
            "version": VERSIONS.get(link),
            "required_by": required_by,
            "origin": origin,
            **facts,
        }


def main() -> None:
    """Does what standard input asks and writes the report."""
    request = json.load(sys.stdin)
    # As pip itself does, whatever directory it runs in: `./libs/foo` in a
    # requirements file is relative to the working directory.
    os.chdir(request["directory"])
    with tempfile.TemporaryDirectory(prefix="wsgi-wasm-") as scratch:
        try:
            report = {"packages": vendor(request, Path(scratch))}
        except Refusal as refusal:
            report = {"error": refusal.report}
        except PipError as error:
            # An index that pip could not reach has nothing, in its eyes.
            if UNREACHED and isinstance(error, DistributionNotFound):
                report = {"error": {"kind": "network", "message": UNREACHED[0]}}
            else:
                report = {"error": {"kind": "pip", "message": explain(error)}}
    # Paths as the user wrote them.
    text = json.dumps(readable(report, request), indent=1)
    Path(request["report"]).write_text(text, encoding="utf-8")


def vendor(request: dict, scratch: Path) -> list[dict]:
    """Fills the target, and returns what is in it, sorted by name."""
    target = Path(request["target"])
    target.mkdir(parents=True, exist_ok=True)
    packages = []
    if request["requirements"] is not None:
        without_compilers(scratch)
        patch(set(request["native"]))
        command = Vendor("wheel", "Vendors requirements.")
        command.target = target
        arguments = ["-qqq", "--no-input", "--disable-pip-version-check"]
        command.main([*arguments, "--progress-bar=off", "-r", request["requirements"]])
        packages = command.packages
    if all(package["name"] != "tzdata" for package in packages):
        packages.append(add_time_zones(target))
    return sorted(packages, key=lambda package: package["name"])


class Vendor(WheelCommand):
    """`pip wheel` for the guest, with wheels unpacked into one directory."""

    target: Path
    packages: list[dict]

    def _run_wrapper(self, level_number, options, args) -> int:
        """Lets exceptions through. pip would log them and return a status."""
        return self.run(options, args)

    @with_cleanup
    def run(self, options, args) -> int:
        """Resolves, downloads, builds what has no wheel, unpacks."""
        # The user's configuration of indexes and certificates holds. Its
        # choices of how to build do not: builds would see the guest's markers,
        # or tools of the private environment.
        options.features_enabled = []
        options.deprecated_features_enabled = []
        options.build_isolation = True
        capture_conflicts()

        session = self.get_default_session(options)
        finder = self._build_package_finder(
            options,
            session,
            target_python=TargetPython(
                platforms=[GUEST_PLATFORM],
                py_version_info=GUEST_VERSION,
                abis=["cp314"],
                implementation="cp",
            ),
        )
        requirements = self.get_requirements(args, options, finder, session)
        preparer = self.make_requirement_preparer(
            temp_build_dir=TempDirectory(kind="wheel", globally_managed=True),
            options=options,
            build_tracker=self.enter_context(get_build_tracker()),
            session=session,
            finder=finder,
            use_user_site=False,
            verbosity=self.verbosity,
            allow_editables=False,
        )
        progress("resolving requirements")
        # Without pip's cache of wheels: what other builds on this machine left
        # there is native, and what this one makes must not get in.
        resolving = self.make_resolver(
            preparer, finder, options, wheel_cache=None, py_version_info=GUEST_VERSION
        )
        resolved = resolving.resolve(requirements, check_supported_wheels=True)
        parents = parents_of(resolving._result.graph)
        requirements = sorted(
            resolved.requirements.values(), key=lambda one: canonicalize_name(one.name)
        )
        progress(f"fetching {len(requirements)} packages")
        preparer.prepare_linked_requirements_more(requirements)

        self.packages = []
        wheels = TempDirectory(kind="wheel", globally_managed=True).path
        for requirement in requirements:
            wheel = requirement.local_file_path
            if not requirement.is_wheel:
                # pip's own name for this step is private, as it is for its
                # caller, which keeps wheels in the cache that is not ours.
                BUILD_OUTPUT.clear()
                wheel = _build_one(requirement, wheels, verify=True, editable=False)
                if wheel is None:
                    raise build_failure(requirement)
            package = unpack(requirement, Path(wheel), self.target)
            package["required_by"] = parents.get(package["name"], [])
            self.packages.append(package)
        return 0


def parents_of(graph) -> dict[str, list[str]]:
    """For each package the sorted names of those that require it."""

    def plain(identifier: str) -> str:
        """`foo` for `foo[extra]`, which is a package of its own to pip."""
        return canonicalize_name(identifier.partition("[")[0])

    parents: dict[str, set[str]] = {}
    for identifier in graph:
        if identifier is None:
            continue
        above = {plain(one) for one in graph.iter_parents(identifier) if one}
        parents.setdefault(plain(identifier), set()).update(above)
    return {name: sorted(above - {name}) for name, above in parents.items()}


def unpack(requirement: InstallRequirement, wheel: Path, target: Path) -> dict:
    """Unpacks a wheel into `target` and describes it, or refuses native code."""
    info = None
    record: list[list[str]] = []
    kept: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            place = place_of(member.filename)
            parts = PurePosixPath(member.filename).parts
            if len(parts) == 2 and parts[0].endswith(".dist-info"):
                if parts[1] == "METADATA":
                    text = archive.read(member).decode("utf-8", "replace")
                    info = email.parser.Parser().parsestr(text, headersonly=True)
                elif parts[1] == "RECORD":
                    text = archive.read(member).decode("utf-8", "replace")
                    record = list(csv.reader(io.StringIO(text)))
            if place is None:
                continue
            content = archive.read(member)
            # A WebAssembly library that componentize-py links is code for the
            # guest, from a wheel that is tagged so.
            if NATIVE.search(place) and not content.startswith(b"\0asm"):
                version = Wheel(wheel.name).version
                raise Refusal("native", requirement, file=place, version=version)
            path = target / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            kept[member.filename] = place
    if info is None:
        raise PipError(f"{wheel.name} has no METADATA")
    directory = next(p for p in kept.values() if p.endswith(".dist-info/METADATA"))
    # `importlib.metadata.files` reads it.
    lines = sorted([kept[row[0]], *row[1:]] for row in record if row and row[0] in kept)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    (target / directory).with_name("RECORD").write_text(text.getvalue(), "utf-8")
    return {
        "name": canonicalize_name(info["Name"]),
        "version": info["Version"],
        "license": license_of(info),
        "sha256": digest_of(requirement),
    }


def place_of(member: str) -> str | None:
    """Where a file of a wheel goes, relative to the target, if it is wanted."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise PipError(f"a wheel has a file that would go outside: {member!r}")
    parts = path.parts
    if parts[0].endswith(".data") and len(parts) > 2:
        # Scripts, headers, and data for places that the guest does not have.
        if parts[1] not in ("purelib", "platlib"):
            return None
        parts = parts[2:]
    if "__pycache__" in parts:
        return None
    if parts[0].endswith(".dist-info") and parts[-1] in UNWANTED_METADATA:
        return None
    return "/".join(parts)


def license_of(info) -> str | None:
    """The licence in a word or two, from the newest field that a package fills."""
    if expression := info["License-Expression"]:
        return expression
    # Some packages have the whole text here.
    text = (info["License"] or "").strip()
    if text and text != "UNKNOWN" and "\n" not in text and len(text) <= 80:
        return text
    names = [
        classifier.rpartition(" :: ")[2]
        for classifier in info.get_all("Classifier", [])
        if classifier.startswith("License :: ")
    ]
    return ", ".join(names) or None


def digest_of(requirement: InstallRequirement) -> str | None:
    """The SHA-256 digest of the archive that pip fetched, if it was one."""
    source = requirement.download_info
    archive = source.to_dict_compat().get("archive_info") if source else None
    return ((archive or {}).get("hashes") or {}).get("sha256")


def add_time_zones(target: Path) -> dict:
    """Copies tzdata from this environment, where it came with a pinned hash."""
    distribution = metadata.distribution("tzdata")
    for file in distribution.files or []:
        if place := place_of(file.as_posix()) if ".." not in file.parts else None:
            path = target / place
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(distribution.locate_file(file), path)
    return {
        "name": "tzdata",
        "version": distribution.version,
        "license": license_of(distribution.metadata),
        "sha256": None,
        "required_by": ["wsgi-wasm"],
    }


def without_compilers(scratch: Path) -> None:
    """Makes every compiler fail, so that builds leave optional parts out.

    Compilers of this machine could only make code for this machine.
    """
    os.environ.update(PURE_SWITCHES)
    if os.name == "nt":
        # No scripts to stand in there. Native code is still refused.
        return
    stubs = scratch / "no-compilers"
    stubs.mkdir()
    for name in COMPILERS:
        stub = stubs / name
        stub.write_text(f'#!/bin/sh\necho "{NO_COMPILER} ($0)" >&2\nexit 1\n')
        stub.chmod(stat.S_IRWXU)
    os.environ["PATH"] = f"{stubs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for variable, name in {
        "CC": "cc",
        "CXX": "c++",
        "LD": "ld",
        "LDSHARED": "cc",
        "LDCXXSHARED": "c++",
        "FC": "gfortran",
        "CARGO": "cargo",
        "RUSTC": "rustc",
    }.items():
        os.environ[variable] = str(stubs / name)


# Output of the last program that a build ran in vain. pip drops it on the way
# from `_build_one`.
BUILD_OUTPUT: list[str] = []
# What pip's resolver logs while it explains a conflict, for `explain`.
CONFLICTS: list[str] = []
# Pages of indexes that pip could not get, and then takes for empty.
UNREACHED: list[str] = []
# The version of each link that the index names, for `Refusal`.
VERSIONS: dict[str | None, str] = {}
# Versions of each project that have wheels for other platforms.
ELSEWHERE: dict[str, set[str]] = {}


def patch(native: set[str]) -> None:
    """Makes pip resolve for the guest and refuse what can not run there."""
    host = markers.default_environment()
    environment = dict(GUEST_MARKERS)
    markers.default_environment = lambda: dict(environment)

    @contextlib.contextmanager
    def host_markers():
        """Builds run here, and so do the tools that they ask for."""
        environment.update(host)
        try:
            yield
        finally:
            environment.update(GUEST_MARKERS)

    applicable = CandidateEvaluator.get_applicable_candidates

    def prefer_wheels(self, candidates):
        """Source distributions count only if no wheel fits the requirement."""
        found = applicable(self, candidates)
        wheels = [one for one in found if one.link.is_wheel]
        return wheels or found

    CandidateEvaluator.get_applicable_candidates = prefer_wheels

    evaluate = LinkEvaluator.evaluate_link

    def note_other_platforms(self, link):
        """Remembers wheels for other platforms, for `refuse_other_platforms`."""
        result = evaluate(self, link)
        if result[0] is LinkType.platform_mismatch:
            name = canonicalize_name(self.project_name)
            ELSEWHERE.setdefault(name, set()).add(Wheel(link.filename).version)
        return result

    LinkEvaluator.evaluate_link = note_other_platforms

    skip_page = collector._handle_get_simple_fail

    def note_unreached(link, reason, meth=None):
        """Remembers why an index did not answer. Not to have a package is an answer."""
        if not str(reason).startswith("404 "):
            UNREACHED.append(f"{redact_auth_from_url(link.url)}: {reason}")
        skip_page(link, reason, meth)

    collector._handle_get_simple_fail = note_unreached

    conflict = factory.Factory.get_installation_error

    def refuse_other_platforms(self, error, constraints):
        """Says that there is only native code, if that is the conflict."""
        for cause in error.causes:
            ireq = cause.requirement.get_candidate_lookup()[1]
            if ireq is None or ireq.req is None:
                continue
            name = cause.requirement.project_name
            specifier = ireq.req.specifier
            here = {str(one.version) for one in self._finder.find_all_candidates(name)}
            there = [
                version
                for version in ELSEWHERE.get(canonicalize_name(name), set())
                if specifier.contains(version)
            ]
            if there and not any(map(specifier.contains, here)):
                # Releases before release candidates.
                newest = max(
                    there, key=lambda v: (not Version(v).is_prerelease, Version(v))
                )
                return Refusal("native", ireq, version=newest)
        return conflict(self, error, constraints)

    factory.Factory.get_installation_error = refuse_other_platforms

    make_candidate = factory.Factory._make_base_candidate_from_link

    def refuse_known_natives(self, link, template, name, version):
        """Saves the download and the build of what is known not to work."""
        if version is not None:
            VERSIONS[link.url_without_fragment] = str(version)
        if not link.is_wheel and name in native:
            raise Refusal("native", template, version=str(version or "") or None)
        return make_candidate(self, link, template, name, version)

    factory.Factory._make_base_candidate_from_link = refuse_known_natives

    unsupported = factory.Factory._fail_if_link_is_unsupported_wheel

    def explain_unsupported(self, link):
        """Says why a wheel that the user names does not do."""
        try:
            unsupported(self, link)
        except UnsupportedWheel as error:
            raise UnsupportedWheel(
                f"{link.filename} is not for CPython 3.14 on WASI, "
                "which runs wheels that end in `-none-any.whl`"
            ) from error

    factory.Factory._fail_if_link_is_unsupported_wheel = explain_unsupported

    prepare = SourceDistribution.prepare_distribution_metadata

    def prepare_source(self, *args, **kwargs):
        """Starts the build of a source distribution, for its metadata."""
        requirement = self.req
        source = Path(requirement.unpacked_source_directory)
        if backend_of(source) in NATIVE_BACKENDS:
            raise Refusal("native", requirement)
        progress(f"building {requirement.name or source.name} from source")
        BUILD_OUTPUT.clear()
        try:
            with host_markers():
                prepare(self, *args, **kwargs)
        except InstallationError as error:
            # Without a program's output it is a fault that pip found itself.
            if not BUILD_OUTPUT:
                raise
            raise build_failure(requirement) from error

    SourceDistribution.prepare_distribution_metadata = prepare_source

    initialize = InstallationSubprocessError.__init__

    def keep_output(self, *, command_description, exit_code, output_lines):
        """Remembers what the program said."""
        BUILD_OUTPUT[:] = [line.rstrip() for line in output_lines or []]
        initialize(
            self,
            command_description=command_description,
            exit_code=exit_code,
            output_lines=output_lines,
        )

    InstallationSubprocessError.__init__ = keep_output

    ensure_source = RequirementPreparer._ensure_link_req_src_dir

    def copy_local_source(self, requirement, parallel_builds):
        """Builds a local package in a copy: setuptools writes into the source."""
        ensure_source(self, requirement, parallel_builds)
        if requirement.link.is_existing_dir():
            copy = Path(TempDirectory(kind="req-build", globally_managed=True).path)
            source = Path(requirement.source_dir)
            destination = copy / (source.name or "source")
            shutil.copytree(
                source, destination, symlinks=True, ignore=unwanted_sources(source)
            )
            requirement.source_dir = str(destination)

    RequirementPreparer._ensure_link_req_src_dir = copy_local_source

    parse = req_command.install_req_from_parsed_requirement

    def never_editable(parsed, **kwargs):
        """Takes `-e ./foo` as `./foo`: an artifact can not refer to a source."""
        if parsed.is_editable:
            name = parsed.requirement
            if os.path.isdir(name) and not name.startswith((".", os.sep)):
                name = os.path.join(".", name)
            parsed = dataclasses.replace(parsed, requirement=name, is_editable=False)
        return parse(parsed, **kwargs)

    req_command.install_req_from_parsed_requirement = never_editable

    class Reporter(resolver.PipReporter):
        """Tells of each version that the resolver settles on, perhaps not for good."""

        def pinning(self, candidate):
            """One line for a package, whatever extras of it are wanted."""
            super().pinning(candidate)
            if candidate.name == candidate.project_name and candidate.source_link:
                progress(f"collected {candidate.name} {candidate.version}")

    resolver.PipReporter = Reporter


def unwanted_sources(source: Path):
    """A filter for `shutil.copytree` that starts at `source`."""

    def unwanted(directory: str, names: list[str]) -> set[str]:
        patterns = BULKY | STALE if Path(directory) == source else BULKY
        return {
            name
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }

    return unwanted


def backend_of(source: Path) -> str:
    """The top-level module of a source tree's build backend, or nothing."""
    try:
        text = (source / "pyproject.toml").read_text(encoding="utf-8")
        backend = tomli.loads(text)["build-system"]["build-backend"]
        return backend.partition(":")[0].partition(".")[0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # No file, or a broken one, which pip will report in its words.
        return ""


def build_failure(requirement: InstallRequirement) -> Refusal:
    """The reason why `requirement` did not build, from what the build said."""
    output = "\n".join(BUILD_OUTPUT)
    return Refusal(
        "build",
        requirement,
        compiler=bool(NEEDS_COMPILER.search(output)),
        output=BUILD_OUTPUT[-25:],
    )


def wanted_by(requirement: InstallRequirement) -> tuple[list[str], str | None]:
    """The packages that lead to `requirement`, nearest first, and the line that
    leads to the last of them."""
    names = [canonicalize_name(requirement.name or "")]
    parent = requirement.comes_from
    while isinstance(parent, InstallRequirement):
        name = canonicalize_name(parent.name or "")
        # A package with extras comes from the same package without.
        if name and name not in names:
            names.append(name)
        parent = parent.comes_from
    return names[1:], parent


def capture_conflicts() -> None:
    """Collects in `CONFLICTS` what the resolver logs of a conflict."""

    class Collector(logging.Handler):
        """Keeps messages."""

        def emit(self, record: logging.LogRecord) -> None:
            """Keeps one message."""
            CONFLICTS.append(record.getMessage())

    logger = logging.getLogger(factory.__name__)
    logger.addHandler(Collector(logging.CRITICAL))
    # The conflict itself is critical to pip, its causes are information.
    logger.handlers[-1].setLevel(logging.INFO)
    logger.setLevel(logging.INFO)


def explain(error: PipError) -> str:
    """What pip would have printed, without advice that does not apply here."""
    if isinstance(error, DiagnosticPipError):
        parts = [error.message, error.context, error.hint_stmt]
        return "\n".join(str(part).strip() for part in parts if part)
    text = [line for line in CONFLICTS if not line.startswith(("Ignoring ", "INFO: "))]
    if not str(error).startswith("ResolutionImpossible"):
        text.append(str(error))
    message = "\n".join(part.strip("\n") for part in text)
    # What follows is advice for pip's command line, and before it the claim that
    # the packages do not exist: the factory looks for them without requirements.
    return re.split(r"\n\s*(Additionally, some|To fix this you)", message)[0].strip()


def readable(value, request: dict):
    """`value` with paths to the requirements file as the user knows them."""
    if isinstance(value, dict):
        return {key: readable(part, request) for key, part in value.items()}
    if isinstance(value, list):
        return [readable(part, request) for part in value]
    if not isinstance(value, str) or request["requirements"] is None:
        return value
    if request["label"] is not None:
        path = re.escape(request["requirements"])
        value = re.sub(rf"(-r )?{path}( \(line \d+\))?", request["label"], value)
    value = value.replace(os.path.join(os.getcwd(), ""), "")
    return re.sub(r"-[rc] (\S+) \(line (\d+)\)", r"\1 line \2", value)


def progress(message: str) -> None:
    """Tells the builder what goes on."""
    print(message, flush=True)


if __name__ == "__main__":
    main()
