use std::path::Path;

use crate::harness::{guest, run, wsgi_wasm};

/// Builds a project of the given files in a directory of its own.
fn build(files: &[(&str, &str)], arguments: &[&str]) -> (tempfile::TempDir, crate::harness::Finished) {
    let project = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = project.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
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
    let server =
        crate::harness::Server::spawn(wsgi_wasm().arg("serve").arg(&file).args(["--bind", "127.0.0.1:0"]));
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
}

#[test]
fn a_second_build_comes_from_the_cache() {
    let first = guest("behaviours");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("again.wasm");
    let again = run(wsgi_wasm()
        .args(["build", "--warmup", "/hello", "--dir"])
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
    let packages = described["manifest"]["packages"].as_array().unwrap();
    let markupsafe =
        packages.iter().find(|package| package["name"] == "MarkupSafe" || package["name"] == "markupsafe");
    let markupsafe = markupsafe.expect("MarkupSafe is a requirement of Jinja2");
    assert!(markupsafe["required_by"].to_string().to_lowercase().contains("jinja2"));
    assert!(packages.iter().any(|package| package["name"] == "tzdata"));
}
