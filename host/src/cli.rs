//! What the user typed. Nothing here is resolved or checked against the
//! machine; `main` hands each command to its module.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::network::Rule;
use crate::pool::Isolation;
use crate::sandbox::Sandbox;
use crate::units::{Size, Time};

/// Hosts Python WSGI apps in WebAssembly sandboxes.
#[derive(Debug, Parser)]
#[command(name = "wsgi-wasm", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a Python project into one file that `serve` runs.
    Build(BuildArgs),
    /// Serve an app over HTTP.
    Serve(ServeArgs),
    /// Run a command, such as a migration, inside an app's sandbox.
    Exec(ExecArgs),
    /// Show what is in a built app.
    Inspect(InspectArgs),
    /// Compile a component to machine code, for our own use.
    #[command(hide = true)]
    Compile {
        /// The component.
        input: PathBuf,
        /// Where the machine code goes.
        output: PathBuf,
    },
}

/// Options of `build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The WSGI callable: `module`, `module:callable` or `module:factory()`
    ///
    /// Without a callable, `app` and then `application` is taken. Without a
    /// module, `wsgi.py`, `app.py` and `main.py` are looked for, and the WSGI
    /// application of a Django project.
    #[arg(value_name = "MODULE[:CALLABLE]")]
    pub application: Option<String>,
    /// A variable for the build, kept in the app as its default at run time (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    #[command(flatten)]
    pub project: ProjectArgs,
    /// The file to write
    #[arg(short, long, value_name = "FILE", default_value = "app.wasm")]
    pub output: PathBuf,
}

/// Options that say what is built.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Build options")]
pub struct ProjectArgs {
    /// The project's directory [default: the current one]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// A requirements file [default: requirements.txt, else the dependencies in pyproject.toml]
    #[arg(short, long, value_name = "FILE")]
    pub requirements: Option<PathBuf>,
    /// A path to request before the snapshot is taken, so that the app starts warm (repeatable)
    #[arg(long, value_name = "PATH")]
    pub warmup: Vec<String>,
    /// Files to leave out, as a name or a path from the project's directory; `*` stands for any text (repeatable)
    #[arg(long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A built app, a project's directory, or a WSGI callable, which is built first
    #[arg(value_name = "APP.wasm | DIR | MODULE[:CALLABLE]", default_value = ".")]
    pub app: String,
    /// Where to listen: ADDRESS:PORT, with port 0 for any free one, or unix:PATH (repeatable)
    #[arg(short, long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    pub bind: Vec<String>,
    /// Requests that can be in work at a time, each in its own instance
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub instances: u16,
    /// Whether instances are reused for the app's next requests or made anew for each
    #[arg(long, value_enum, default_value_t)]
    pub isolation: Isolation,
    /// Requests after which an instance is replaced
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_requests: u64,
    #[command(flatten)]
    pub grants: GrantArgs,
    /// Time that the app may take until its response starts, and for each piece of it
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub timeout: Time,
    /// Largest request body
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    pub max_body: Size,
    /// Time in which a client must send or take something of a body
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub client_timeout: Time,
    /// Time in which a client must send the head of a request, and that an idle connection stays open
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub header_timeout: Time,
    /// Connections that can be open at a time
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Requests that may wait for an instance
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue: u32,
    /// Time that a request may wait for an instance
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub queue_wait: Time,
    /// Time to finish what is running after SIGTERM or SIGINT
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub grace: Time,
    /// Whether the server confines its own process once the app is loaded
    #[arg(long, value_enum, default_value_t)]
    pub sandbox: Sandbox,
    #[command(flatten)]
    pub project: ProjectArgs,
}

impl ProjectArgs {
    /// The name of an option that was given, if any.
    pub fn given(&self) -> Option<&'static str> {
        [
            (self.dir.is_some(), "--dir"),
            (self.requirements.is_some(), "--requirements"),
            (!self.warmup.is_empty(), "--warmup"),
            (!self.exclude.is_empty(), "--exclude"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }
}

/// What an app's instances may use.
#[derive(Debug, Args)]
pub struct GrantArgs {
    /// Memory of one instance
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    pub memory: Size,
    /// An environment variable for the app (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// A directory that the app sees as /data and may write to
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Bytes that the files in the data directory may have together
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub data_quota: Size,
    /// Files and directories that the data directory may hold
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub data_files: u64,
    /// Bytes that an instance may keep in its /tmp, which is in memory
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    pub tmp: Size,
    /// What the app may connect to by TCP: HOST:PORT, *.DOMAIN:PORT, ADDRESS:PORT or
    /// ADDRESS/BITS:PORT, with port * for any (repeatable)
    #[arg(long, value_name = "HOST:PORT")]
    pub network: Vec<Rule>,
    /// Bytes that an instance may send and receive over its connections
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub network_quota: Size,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// A built app, a project's directory, or a WSGI callable, which is built first
    #[arg(value_name = "APP.wasm | DIR | MODULE[:CALLABLE]")]
    pub app: String,
    #[command(flatten)]
    pub grants: GrantArgs,
    /// Time that the command may take [default: no limit]
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Time>,
    #[command(flatten)]
    pub project: ProjectArgs,
    /// The command: `python FILE ...`, `python -m MODULE ...` or `python -c CODE ...`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The built app
    #[arg(value_name = "APP.wasm")]
    pub app: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Reads `KEY=VALUE`.
fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err("the name before `=` is empty".into()),
        Some((key, value)) if !key.contains('\0') && !value.contains('\0') => Ok((key.into(), value.into())),
        Some(_) => Err("a variable can not hold a NUL".into()),
        None => Err(format!("write `{text}=VALUE`")),
    }
}
