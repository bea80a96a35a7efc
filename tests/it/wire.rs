//! The corpus in `tests/wire`: each `NNN-name.http` is sent as it is, and its
//! `.expect` says what must come back. A line is a status, and the body if one
//! follows; `head` stands before the status of a response that has no body.
//! The last line says whether the connection then is `open` or `closed`.

use std::path::Path;

use crate::harness::{Connection, Server};

#[test]
fn each_case_of_the_wire_corpus_is_answered_as_expected() {
    let server = Server::start("behaviours", &["--header-timeout", "1s"]);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/wire");
    let mut cases: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "http"))
        .collect();
    cases.sort();
    assert!(cases.len() >= 60, "only {} cases were found", cases.len());
    let failed: Vec<_> = cases.iter().filter_map(|case| check(&server, case).err()).collect();
    eprintln!("HTTP/1: {} cases, {} answered as expected", cases.len(), cases.len() - failed.len());
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"));
    server.finish();
}

fn check(server: &Server, case: &Path) -> Result<(), String> {
    let name = case.file_stem().unwrap().to_string_lossy();
    let expected = std::fs::read_to_string(case.with_extension("expect")).unwrap();
    let mut connection = server.connect();
    // A refusal may come before all was sent.
    let _ = connection.try_send(std::fs::read(case).unwrap());
    for line in expected.lines() {
        let outcome = match line {
            "open" => is_open(&mut connection),
            "closed" => connection.is_closed().then_some(()).ok_or("the connection is open".to_owned()),
            line => answers(&mut connection, line),
        };
        outcome.map_err(|problem| format!("{name}: {problem}"))?;
    }
    Ok(())
}

fn answers(connection: &mut Connection, line: &str) -> Result<(), String> {
    let (method, line) = match line.strip_prefix("head ") {
        Some(line) => ("HEAD", line),
        None => ("GET", line),
    };
    let (status, body) = line.split_once(' ').unwrap_or((line, ""));
    let response = connection.try_read_response(method).ok_or(format!("no response, but not {line}"))?;
    if response.status.to_string() != status || response.cut {
        return Err(format!("{} and not {status}: {response:?}", response.status));
    }
    if response.status == 200 || response.status == 404 {
        let wanted = body.replace("\\n", "\n");
        return if response.text() == wanted {
            Ok(())
        } else {
            Err(format!("the body is {:?}", response.text()))
        };
    }
    // Ours, with an id and nothing of what the client or the app has said.
    let text = response.text();
    let lines: Vec<_> = text.lines().collect();
    match lines[..] {
        [first, second] if first.starts_with(status) && second.starts_with("request ") => Ok(()),
        _ => Err(format!("not one of our own responses: {text:?}")),
    }
}

fn is_open(connection: &mut Connection) -> Result<(), String> {
    let sent = connection.try_send("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n");
    match sent.ok().and_then(|()| connection.try_read_response("GET")) {
        Some(response) if response.status == 200 => Ok(()),
        other => Err(format!("the connection does not go on: {other:?}")),
    }
}
