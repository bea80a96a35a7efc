//! The control socket: what `wsgi-wasm ctl` asks of a running server.
//!
//! HTTP with JSON over a unix socket, which only its owner may open. Who can
//! reach it may do everything, so it is never on a network.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixListener;

use crate::cli::{ControlArgs, ControlCommand};
use crate::error::UserError;
use crate::tenants::Tenants;
use crate::units::approximate;

/// The body of a request to deploy.
#[derive(Serialize, Deserialize)]
struct Deployment {
    app: PathBuf,
}

/// Listens on `path` and answers until the server ends.
///
/// # Errors
///
/// A [`UserError`] if the socket can not be made.
pub fn start(tenants: Arc<Tenants>, path: &Path) -> Result<()> {
    crate::listener::remove_stale_socket(path);
    let listener = UnixListener::bind(path).map_err(|error| {
        UserError::new(format!("can not make the control socket `{}`: {error}", path.display()))
            .remedy("choose a path in a directory that exists, or stop the server that uses it")
    })?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("failed to protect `{}`", path.display()))?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let tenants = Arc::clone(&tenants);
            tokio::spawn(async move {
                let service = service_fn(|request| answer(Arc::clone(&tenants), request));
                let conversation = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = conversation.await {
                    tracing::debug!("control connection ended: {error}");
                }
            });
        }
    });
    Ok(())
}

async fn answer(
    tenants: Arc<Tenants>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match act(&tenants, request).await {
        Ok(value) => (StatusCode::OK, value),
        Err(error) => (StatusCode::BAD_REQUEST, json!({ "error": format!("{error:#}") })),
    };
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    Ok(response)
}

async fn act(tenants: &Arc<Tenants>, request: Request<Incoming>) -> Result<serde_json::Value> {
    let (parts, body) = request.into_parts();
    let path: Vec<&str> = parts.uri.path().split('/').skip(1).collect();
    match (&parts.method, &path[..]) {
        (&Method::GET, ["tenants"]) => Ok(serde_json::to_value(tenants.list())?),
        (&Method::GET, ["tenants", name, "errors"]) => Ok(serde_json::to_value(tenants.errors(name)?)?),
        (&Method::POST, ["tenants", name, "deploy"]) => {
            let body =
                Limited::new(body, 64 << 10).collect().await.map_err(|error| anyhow::anyhow!(error))?;
            let deployment: Deployment = serde_json::from_slice(&body.to_bytes())?;
            tenants.deploy(name, &deployment.app).await?;
            Ok(json!({ "done": format!("`{name}` serves {}", deployment.app.display()) }))
        }
        (&Method::POST, ["tenants", name, "rollback"]) => {
            tenants.roll_back(name).await?;
            Ok(json!({ "done": format!("`{name}` serves the version before") }))
        }
        (&Method::POST, ["tenants", name, "drain"]) => {
            tenants.drain(name).await?;
            Ok(json!({ "done": format!("`{name}` is suspended, and nothing of it is at work") }))
        }
        (&Method::POST, ["tenants", name, "suspend"]) => {
            tenants.suspend(name, true).await?;
            Ok(json!({ "done": format!("`{name}` is suspended") }))
        }
        (&Method::POST, ["tenants", name, "resume"]) => {
            tenants.suspend(name, false).await?;
            Ok(json!({ "done": format!("`{name}` takes requests") }))
        }
        (&Method::POST, ["reload"]) => {
            tenants.reload().await?;
            Ok(json!({ "done": "the configuration is reloaded" }))
        }
        _ => bail!("there is no such command"),
    }
}

/// The `ctl` command: asks the server and prints the answer.
///
/// # Errors
///
/// A [`UserError`] if there is no server or it refuses.
pub fn run(args: &ControlArgs) -> Result<()> {
    let path = args.control.strip_prefix("unix:").unwrap_or(&args.control);
    let (method, target, body) = match &args.command {
        ControlCommand::List { .. } => ("GET", "/tenants".to_owned(), String::new()),
        ControlCommand::Errors { tenant } => ("GET", format!("/tenants/{tenant}/errors"), String::new()),
        ControlCommand::Deploy { tenant, app } => {
            let app = app.canonicalize().map_err(|error| {
                UserError::new(format!("there is no app `{}`: {error}", app.display()))
                    .remedy("build one with `wsgi-wasm build`")
            })?;
            let body = serde_json::to_string(&Deployment { app })?;
            ("POST", format!("/tenants/{tenant}/deploy"), body)
        }
        ControlCommand::Rollback { tenant } => ("POST", format!("/tenants/{tenant}/rollback"), String::new()),
        ControlCommand::Drain { tenant } => ("POST", format!("/tenants/{tenant}/drain"), String::new()),
        ControlCommand::Suspend { tenant } => ("POST", format!("/tenants/{tenant}/suspend"), String::new()),
        ControlCommand::Resume { tenant } => ("POST", format!("/tenants/{tenant}/resume"), String::new()),
        ControlCommand::Reload => ("POST", "/reload".to_owned(), String::new()),
    };
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(path)?;
        let length = body.len();
        write!(
            stream,
            "{method} {target} HTTP/1.1\r\nHost: control\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(response)
    };
    let response = ask().map_err(|error| {
        UserError::new(format!("can not reach a server at `{path}`: {error}"))
            .remedy("start one whose configuration has `control = \"unix:PATH\"`, and name the same path")
    })?;
    let (_, body) = response.split_once("\r\n\r\n").context("the server's answer is not HTTP")?;
    let answer: serde_json::Value = serde_json::from_str(body).context("the server's answer is not JSON")?;
    if let Some(error) = answer["error"].as_str().filter(|_| answer.is_object()) {
        return Err(UserError::new(error).into());
    }
    print(args, &answer)
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn print(args: &ControlArgs, answer: &serde_json::Value) -> Result<()> {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".into(),
        other => other.to_string(),
    };
    match (&args.command, answer.as_array()) {
        (ControlCommand::List { json: false }, Some(tenants)) => {
            println!(
                "{:<20} {:<10} {:>9} {:>9} {:>7} {:>8} {:>9} {:>9}  APP",
                "TENANT", "STATE", "REQUESTS", "FAILURES", "IN WORK", "RESTING", "MEMORY", "CPU"
            );
            for tenant in tenants {
                println!(
                    "{:<20} {:<10} {:>9} {:>9} {:>7} {:>8} {:>9} {:>8.1}s  {}",
                    text(&tenant["name"]),
                    text(&tenant["state"]),
                    text(&tenant["requests"]),
                    text(&tenant["failures"]),
                    text(&tenant["in_work"]),
                    text(&tenant["resting"]),
                    approximate(tenant["memory"].as_u64().unwrap_or_default()),
                    tenant["cpu_seconds"].as_f64().unwrap_or_default(),
                    text(&tenant["app"]),
                );
                if let Some(error) = tenant["error"].as_str() {
                    println!("  the new version is not used: {error}");
                }
            }
        }
        (ControlCommand::Errors { .. }, Some(errors)) => {
            for error in errors {
                println!("{} {} {}", text(&error["time"]), text(&error["request"]), text(&error["error"]));
            }
        }
        _ => match answer["done"].as_str() {
            Some(done) => println!("{done}"),
            None => println!("{}", serde_json::to_string_pretty(answer)?),
        },
    }
    Ok(())
}
