use std::path::Path;
use std::process::Command;

/// They are plain `unittest`, so that this machine's Python is enough.
#[test]
fn the_adapters_own_tests_pass() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("python3")
        .args(["-W", "error", "-m", "unittest", "discover", "-s", "guest-python/tests", "-t", "guest-python"])
        .current_dir(root)
        .output()
        .expect("python3 is needed to build apps, and for the tests");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let ran: u32 = text
        .lines()
        .find_map(|line| line.strip_prefix("Ran ")?.split(' ').next()?.parse().ok())
        .expect("no count of tests");
    assert!(ran > 50, "only {ran} tests were found");
}

/// Each route of the guest `behaviours` is there for a test.
#[test]
fn every_behaviour_is_tested() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
    let app = std::fs::read_to_string(here.join("guests/behaviours/app.py")).unwrap();
    let (_, routes) = app.split_once("ROUTES = {").unwrap();
    let (_, routes) = routes.split_once("for function in (").unwrap();
    let (routes, _) = routes.split_once(')').unwrap();
    let tests: String = std::fs::read_dir(here.join("it"))
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    for route in routes.split(',').map(str::trim).filter(|route| !route.is_empty()) {
        let path = format!("/{}", route.replace('_', "-"));
        let used = ["\"", "?", " "].iter().any(|end| tests.contains(&format!("{path}{end}")));
        assert!(used, "no test asks for {path}");
    }
}
