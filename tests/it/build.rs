use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::harness::{Finished, Server, guest, run, wsgi_wasm};

/// A project of the given files in a directory of its own.
fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
    let project = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = project.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    project
}

/// Builds such a project.
fn build(files: &[(&str, &str)], arguments: &[&str]) -> (tempfile::TempDir, Finished) {
    let project = project(files);
    let done = run(wsgi_wasm().arg("build").args(arguments).current_dir(project.path()));
    (project, done)
}

#[test]
fn a_build_that_can_not_start_says_why() {
    build(&[], &[]).1.refused(&["found no WSGI app", "help:"]);
    build(&[("app.py", "")], &["app.py"]).1.refused(&["names a file", "write `app`"]);
    build(&[("app.py", "")], &["app:"]).1.refused(&["nothing behind the colon", "help:"]);
    build(&[], &["--dir", "nowhere"]).1.refused(&["nowhere", "--dir"]);
    build(&[("app.py", "")], &["-r", "nothing.txt"]).1.refused(&["nothing.txt", "help:"]);
    build(&[("app.py", "")], &["--static", "nothing"]).1.refused(&["there is no `=`", "help:"]);
    for path in ["nopath", "http://x/", "", "/a\nb"] {
        build(&[("app.py", "")], &["--warmup", path]).1.refused(&["--warmup"]);
    }
    // Before the work, and not after it.
    for output in ["/no/such/directory/x.wasm", "."] {
        let (_, done) = build(&[("app.py", "def app(e, s): pass\n")], &["-o", output]);
        assert!(!done.refused(&["can not write", output, "--output"]).stderr.contains(" s] "));
    }
}

/// Nothing is built for a name that nothing has.
#[test]
fn a_mistyped_name_is_refused_before_a_build() {
    let project = project(&[("app.py", "def app(e, s): pass\n"), ("notes.txt", "")]);
    for (command, rest) in [("serve", &[][..]), ("build", &[]), ("exec", &["--", "python", "-V"])] {
        for (name, reason) in [
            ("missing.txt", "neither a file nor a module `missing.txt`"),
            ("app.wsm", "neither a file nor a module `app.wsm`"),
            ("nosuch:app", "no module `nosuch`"),
        ] {
            let mut serve = wsgi_wasm();
            let done = run(serve.arg(command).arg(name).args(rest).current_dir(project.path()));
            let done = done.refused(&[reason, "write one of `app`"]);
            assert!(!done.stderr.contains(" s] "), "{}", done.stderr);
        }
    }
    // With requirements it can be in a package, which is looked into before the app is run.
    std::fs::write(project.path().join("requirements.txt"), "").unwrap();
    let done = run(wsgi_wasm().args(["build", "nosuch:app"]).current_dir(project.path()));
    assert!(!done.refused(&["no module `nosuch`"]).stderr.contains("importing"));
}

/// What a build takes when it is told nothing, with two who want it at once.
#[test]
fn two_builders_at_once_make_one_app_of_the_defaults() {
    let app = "import itsdangerous\n\ndef application(environ, start_response):\n    \
               path = environ['PATH_INFO']\n    assert path != '/fails', 'not yet'\n    \
               start_response('200 OK' if path == '/' else '404 Not Found', [])\n    \
               return [itsdangerous.Signer('key').sign('text')]\n";
    let pyproject = "[project]\nname = 'shop'\nversion = '1'\ndependencies = ['itsdangerous==2.2.0']\n";
    // Another one whenever the tests run: else it is built already.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let other = format!("# {}\n1/0", now.as_nanos());
    let files = [("wsgi.py", app), ("pyproject.toml", pyproject), ("app.py", &other)];
    let project = project(&files);
    let builders = ["one.wasm", "two.wasm"].map(|output| {
        let mut command = wsgi_wasm();
        command.args(["build", "--warmup", "/", "--warmup", "/nowhere", "--warmup", "/fails"]);
        command.args(["--output", output]).current_dir(project.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    });
    let [one, two] = builders.map(|builder| Finished::new(&builder.wait_with_output().unwrap()).success());
    let said = [one.stderr, two.stderr];
    for (text, times) in [
        ("importing the app and taking the snapshot", 1),
        ("warmed up /: 200", 1),
        ("warning: the warm-up request `/nowhere` was answered with status 404", 1),
        ("warning: the warm-up request `/fails` failed", 1),
        ("AssertionError: not yet", 1),
    ] {
        let found = said.iter().filter(|text_of_one| text_of_one.contains(text)).count();
        assert_eq!(found, times, "{text}: {said:?}");
    }
    // Both may, for what another test makes.
    assert!(said.iter().any(|text| text.contains("waiting for another process")), "{said:?}");
    let [one, two] = ["one.wasm", "two.wasm"].map(|output| project.path().join(output));
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap(), "not the same file");
    let server = Server::spawn(wsgi_wasm().arg("serve").arg(&one).args(["--bind", "127.0.0.1:0"]));
    assert!(server.get("/").ok().starts_with("text."));
    assert_eq!(server.get("/nowhere").status, 404);
    server.finish();
    let described = run(wsgi_wasm().arg("inspect").arg(&two)).success().stdout;
    for line in ["application  wsgi:application", "  itsdangerous ", "warmed up    /fails"] {
        assert!(described.contains(line), "{line}: {described}");
    }
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    let marker = "a_build_that_has_no_end.py";
    let project = project(&[("app.py", "while True: pass\n"), (marker, "")]);
    let apps = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache/apps-v2");
    let left = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&apps).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.join("guest/app").join(marker).exists()).collect()
    };
    for (signal, status) in [("TERM", 143), ("INT", 130)] {
        let mut command = wsgi_wasm();
        command.args(["build", "app"]).current_dir(project.path()).stderr(Stdio::piped());
        let mut builder = command.spawn().unwrap();
        let mut said = BufReader::new(builder.stderr.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap().contains("importing the app")), "no build");
        assert_eq!(left().len(), 1);
        let id = builder.id().to_string();
        run(std::process::Command::new("kill").args(["-s", signal, &id])).success();
        // Ends only if all who write to it have ended.
        assert_eq!(said.count(), 0);
        assert_eq!(builder.wait().unwrap().code(), Some(status));
        assert_eq!(left(), Vec::<PathBuf>::new());
    }
}

/// Reads a number of a section's (LEB128).
fn number(bytes: &[u8], at: &mut usize) -> usize {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[*at];
        *at += 1;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// Where our sections start in an artifact, with their names.
fn our_sections(artifact: &[u8]) -> Vec<(String, usize)> {
    let (mut found, mut at) = (Vec::new(), 8);
    while at < artifact.len() {
        let (start, id) = (at, artifact[at]);
        at += 1;
        let size = number(artifact, &mut at);
        let end = at + size;
        if id == 0 {
            let length = number(artifact, &mut at);
            let name = String::from_utf8_lossy(&artifact[at..at + length]).into_owned();
            if name.starts_with("wsgi-wasm:") {
                found.push((name, start));
            }
        }
        at = end;
    }
    found
}

#[test]
fn an_artifact_that_is_not_whole_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let whole = std::fs::read(guest("behaviours")).unwrap();
    let sections = our_sections(&whole);
    let names: Vec<_> = sections.iter().map(|(name, _)| name.as_str()).collect();
    let layers = ["wsgi-wasm:layer:python", "wsgi-wasm:layer:site", "wsgi-wasm:layer:app"];
    assert_eq!(names, [&["wsgi-wasm:manifest"][..], &layers].concat());
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    for (bytes, reason) in [
        (whole[..sections[3].1].to_vec(), "the layer `app` is missing"),
        (whole[..sections[1].1].to_vec(), "the layer `python` is missing"),
        (flipped(whole.len() - 100), "the layer `app` is not what was built"),
        (flipped(sections[2].1 + 1000), "the layer `site` is not what was built"),
        (flipped(sections[0].1 / 2), "its code and memory are not what was built"),
    ] {
        let path = directory.path().join("app.wasm");
        std::fs::write(&path, bytes).unwrap();
        run(wsgi_wasm().arg("serve").arg(&path).args(["--bind", "127.0.0.1:0"]))
            .refused(&[reason, "app.wasm", "help:"]);
        run(wsgi_wasm().arg("inspect").arg(&path)).refused(&[reason, "help:"]);
    }
}

/// Puts a manifest of one's own behind the component of the guest `behaviours`.
fn forge(path: &Path, manifest: &serde_json::Value) {
    let whole = std::fs::read(guest("behaviours")).unwrap();
    let mut forged = whole[..our_sections(&whole)[0].1].to_vec();
    let name = b"wsgi-wasm:manifest";
    let content =
        [&[u8::try_from(name.len()).unwrap()], &name[..], &serde_json::to_vec(manifest).unwrap()].concat();
    forged.push(0);
    let mut size = content.len();
    while size > 0x7f {
        forged.push((size & 0x7f) as u8 | 0x80);
        size >>= 7;
    }
    forged.push(size as u8);
    forged.extend(content);
    std::fs::write(path, forged).unwrap();
}

#[test]
fn a_forged_manifest_does_not_reach_the_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("forged.wasm");
    let evil = "a\x1b[2Jb\x07c\u{9b}d\r\ne";
    let mut manifest = serde_json::json!({
        "format": 1, "application": evil, "python": evil, "tools": { evil: evil }, "warmup": [evil],
        "packages": [{ "name": evil, "version": evil, "license": evil }],
        "environment": { evil: evil }, "static": { evil: evil }, "inputs": evil, "layers": [],
    });
    forge(&path, &manifest);
    for arguments in [&["inspect"][..], &["inspect", "--json"]] {
        let shown = run(wsgi_wasm().args(arguments).arg(&path)).success().stdout;
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
        assert!(shown.contains("[2Jb"), "{shown}");
    }
    let shown = run(wsgi_wasm().args(["inspect", "--json"]).arg(&path)).success().stdout;
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["manifest"]["application"], evil);
    // Files that are nowhere can not be served.
    manifest["static"] = serde_json::json!({ "/static": "public" });
    forge(&path, &manifest);
    run(wsgi_wasm().arg("serve").arg(&path).args(["--bind", "127.0.0.1:0"]))
        .refused(&["static files under `/static`", "no layer `app`"]);
    // Nor does it in a message.
    manifest["layers"] = serde_json::json!([{ "name": evil, "sha256": "", "files": 0, "size": 0 }]);
    forge(&path, &manifest);
    let refused = run(wsgi_wasm().arg("inspect").arg(&path)).refused(&["manifest that can not be read"]);
    assert!(!refused.stderr.chars().any(|c| c.is_control() && c != '\n'), "{:?}", refused.stderr);
}

#[test]
fn an_app_that_does_not_import_shows_its_traceback() {
    let app = "import os\n\ndef setting(name):\n    return os.environ[name]\n\nKEY = setting('API_KEY')\n";
    let (project, done) = build(&[("app.py", app)], &["app:app"]);
    done.refused(&["Traceback", "File \"/0/app.py\", line 4", "KeyError: 'API_KEY'"]);
    assert!(!project.path().join("app.wasm").exists());

    build(&[("app.py", "import no_such_package\n")], &["app"]).1.refused(&[
        "no_such_package",
        "requirements",
        "help:",
    ]);
    build(&[("app.py", "def aplication(e, s): pass\n")], &["app:application"])
        .1
        .refused(&["no attribute `application`", "did you mean `aplication`?"]);
    build(&[("app.py", "def app(e, s): pass\n")], &["app", "--static", "/static=public"]).1.refused(&[
        "`/static`",
        "no directory `public`",
        "help:",
    ]);
    build(&[("app.py", "app = 42\n")], &["app"]).1.refused(&["its `app` is not callable but int"]);
    build(&[("app.py", "import socket\nsocket.create_connection(('127.0.0.1', 1))\n")], &["app"])
        .1
        .refused(&["network"]);
}

#[test]
fn a_factory_is_called_and_a_built_file_tells_what_is_in_it() {
    let app = "import os\n\ndef create_app(name='default'):\n    greeting = os.environ['GREETING']\n    \
               def run(environ, start_response):\n        start_response('200 OK', [])\n        \
               return [f'{greeting} {name}'.encode()]\n    return run\n";
    let (project, done) =
        build(&[("app.py", app)], &["app:create_app('factory')", "--env", "GREETING=hi", "-o", "out.wasm"]);
    done.success();
    let file = project.path().join("out.wasm");
    let server = Server::spawn(wsgi_wasm().arg("serve").arg(&file).args(["--bind", "127.0.0.1:0"]));
    assert_eq!(server.get("/").ok(), "hi factory");
    server.finish();

    let described = run(wsgi_wasm().args(["inspect", "--json"]).arg(&file)).success().stdout;
    let described: serde_json::Value = serde_json::from_str(&described).unwrap();
    let manifest = &described["manifest"];
    assert_eq!(manifest["application"], "app:create_app('factory')");
    assert_eq!(manifest["environment"]["GREETING"], "hi");
    assert!(manifest["python"].as_str().unwrap().starts_with("3.14"));
    assert_eq!(manifest["tools"]["componentize-py"], "0.25.1");
    let layers: Vec<_> = described["layers"].as_array().unwrap().iter().map(|layer| &layer["name"]).collect();
    assert_eq!(layers, ["python", "site", "app"]);
    let names = described["component"]["imports"].to_string();
    assert!(names.contains("wsgi-wasm:gateway/response"), "{names}");
    let text = run(wsgi_wasm().arg("inspect").arg(&file)).success().stdout;
    assert!(text.contains("application  app:create_app('factory')"), "{text}");
    assert!(text.contains("world        wsgi-wasm:gateway/application@0.1.0"), "{text}");
    let component = &described["component"];
    let [all, snapshot, code] =
        ["size", "snapshot_size", "code_size"].map(|size| component[size].as_u64().unwrap());
    assert_eq!(all, snapshot + code);
    assert!(snapshot > 5_000_000 && code > 5_000_000, "{snapshot} {code}");
}

#[test]
fn a_second_build_comes_from_the_cache() {
    let first = guest("behaviours");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("again.wasm");
    let again = run(wsgi_wasm()
        .args(["build", "--warmup", "/hello", "--warmup", "/classes", "--dir"])
        .arg(crate::harness::guest_sources("behaviours"))
        .arg("-o")
        .arg(&output))
    .success();
    assert!(again.stderr.contains("nothing has changed"), "{}", again.stderr);
    assert!(std::fs::read(first).unwrap() == std::fs::read(output).unwrap(), "not the same file");
}

#[test]
fn native_packages_are_refused_by_name() {
    let (_project, done) = build(&[("app.py", ""), ("requirements.txt", "pydantic>=2.5\n")], &["app"]);
    done.refused(&["pydantic-core", "pydantic", "native", "help:"]);
}

#[test]
fn packages_are_listed_with_what_needs_them() {
    let described = run(wsgi_wasm().args(["inspect", "--json"]).arg(guest("flask"))).success().stdout;
    let described: serde_json::Value = serde_json::from_str(&described).unwrap();
    let written = described["component"]["written_size"].as_u64().unwrap();
    assert!((100_000..4_000_000).contains(&written), "what a request writes to: {written}");
    let packages = described["manifest"]["packages"].as_array().unwrap();
    let markupsafe =
        packages.iter().find(|package| package["name"] == "MarkupSafe" || package["name"] == "markupsafe");
    let markupsafe = markupsafe.expect("MarkupSafe is a requirement of Jinja2");
    assert!(markupsafe["required_by"].to_string().to_lowercase().contains("jinja2"));
    assert!(packages.iter().any(|package| package["name"] == "tzdata"));
}
