//! What the user typed. Nothing here is resolved or checked against the
//! machine; `main` hands each command to its module.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::access_log;
use crate::bounds;
use crate::code::Sharing;
use crate::forwarded::Dialect;
use crate::network::Rule;
use crate::pool::Isolation;
use crate::sandbox::Sandbox;
use crate::units::{Size, Time, within};

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
    Serve(Box<ServeArgs>),
    /// Run a command, such as a migration, inside an app's sandbox.
    Exec(ExecArgs),
    /// Show what is in a built app.
    Inspect(InspectArgs),
    /// Read a configuration file and say what is wrong with it.
    Check(CheckArgs),
    /// Ask a running server, or tell it what to do.
    Ctl(ControlArgs),
    /// Show or clear the cache of toolchains, built apps and machine code
    Cache {
        /// What to do
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Compile a component to machine code, for our own use.
    #[command(hide = true)]
    Compile {
        /// The component.
        input: PathBuf,
        /// The directory to make, for the machine code.
        output: PathBuf,
        /// How much of the code is shared [default: as much as possible]
        #[arg(long, value_enum)]
        code: Option<Sharing>,
    },
    /// Print the pages of an app's memory that a request writes to, for our own use.
    #[command(hide = true)]
    WrittenPages(WrittenPagesArgs),
}

/// Options of `build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The WSGI callable: `module`, `module:callable` or `module:factory()`; or the project's directory
    ///
    /// Without a callable, `app` and then `application` is taken. Without a
    /// module, `wsgi.py`, `app.py` and `main.py` are looked for, and the WSGI
    /// application of a Django project.
    #[arg(value_name = "MODULE[:CALLABLE]")]
    pub application: Option<String>,
    /// A variable for the build, kept in the app as its default at run time (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// Let the host serve the files of one of the project's directories under a path, without the app (repeatable)
    #[arg(long = "static", value_name = "/PATH=DIR")]
    pub static_files: Vec<String>,
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
    #[arg(long, value_name = "PATH", value_parser = parse_warmup)]
    pub warmup: Vec<String>,
    /// Files to leave out, as a name or a path from the project's directory; `*` stands for any text (repeatable)
    #[arg(long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A built app, a project's directory, or a WSGI callable, which is built first [default: the
    /// project in the current directory]
    #[arg(value_name = "APP.wasm | DIR | MODULE[:CALLABLE]")]
    pub app: Option<String>,
    /// A configuration file with many tenants
    #[arg(long, value_name = "FILE", conflicts_with_all = ["app", "tenants"])]
    pub config: Option<PathBuf>,
    /// A directory in which each NAME.wasm is a tenant, with its settings in NAME.toml
    #[arg(long, value_name = "DIR", conflicts_with = "app")]
    pub tenants: Option<PathBuf>,
    /// Where `wsgi-wasm ctl` reaches the server: unix:PATH
    #[arg(long, value_name = "unix:PATH", value_parser = parse_control)]
    pub control: Option<PathBuf>,
    /// Where changes made by `ctl` are kept over a restart [default: beside the
    /// configuration, or in the directory of --tenants]
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Where to listen: ADDRESS:PORT, with port 0 for any free one, or unix:PATH (repeatable)
    /// [default: the sockets that systemd passes, else 127.0.0.1:8000]
    #[arg(short, long, value_name = "ADDRESS")]
    pub bind: Vec<String>,
    /// Requests that can be in work at a time, each in its own instance
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = within(bounds::INSTANCES))]
    pub instances: u16,
    /// Whether instances are reused for the app's next requests or made anew for each
    #[arg(long, value_enum, default_value_t)]
    pub isolation: Isolation,
    /// Requests after which an instance is replaced
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = within(bounds::REQUESTS))]
    pub max_requests: u64,
    #[command(flatten)]
    pub grants: GrantArgs,
    /// Memory of all instances together, with what the host holds for them [default: half of what
    /// they may have one by one, but at least 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = within(bounds::TOTAL_MEMORY))]
    pub total_memory: Option<Size>,
    /// Time that the app may take until its response starts, and for each piece of it
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = within(bounds::TIME))]
    pub timeout: Time,
    /// Processor time that one request may take [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = within(bounds::TIME))]
    pub cpu: Option<Time>,
    /// Largest request body
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    pub max_body: Size,
    /// Time that a response may take from its first byte to its last
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = within(bounds::TIME))]
    pub response_time: Time,
    /// Lines that the app may log in a second, on average over five
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub log_lines: u32,
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
    pub http: HttpArgs,
    #[command(flatten)]
    pub project: SourceArgs,
}

/// Options of `serve` that concern clients and connections.
#[derive(Debug, Args)]
#[command(next_help_heading = "HTTP options")]
pub struct HttpArgs {
    /// Time in which a client must send or take something of a body
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = within(bounds::TIME))]
    pub client_timeout: Time,
    /// Bytes of a body that a client must send in a second, on average after the first 10 seconds; 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "256B")]
    pub min_rate: Size,
    /// Time in which a client must send the head of a request, or do a TLS handshake
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = within(bounds::TIME))]
    pub header_timeout: Time,
    /// Largest head of a request, with all its headers
    #[arg(long, value_name = "SIZE", default_value = "32KiB", value_parser = within(Size(1 << 10)..=Size(1 << 20)))]
    pub max_header_size: Size,
    /// Headers that a request can have
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = within(1..=10_000_u16))]
    pub max_headers: u16,
    /// Longest target of a request: path and query
    #[arg(long, value_name = "SIZE", default_value = "8KiB", value_parser = within(Size(64)..=Size(65_534)))]
    pub max_uri: Size,
    /// Time that a connection without a request stays open
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub keep_alive: Time,
    /// Requests after which a connection is closed
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = within(bounds::REQUESTS))]
    pub keep_alive_requests: u64,
    /// Connections that can be open at a time
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = within(bounds::SOME))]
    pub max_connections: u32,
    /// Connections that one client address can have, or one IPv6 network of /64; trusted proxies have no limit
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = within(bounds::SOME))]
    pub max_connections_per_client: u32,
    /// Requests that can be under way at a time on one HTTP/2 connection
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = within(bounds::SOME))]
    pub http2_streams: u32,
    /// Streams that a client of HTTP/2 may reset before they were looked at, or break, until its connection ends
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = within(1..=u16::MAX))]
    pub http2_resets: u16,
    /// A certificate chain, as PEM, for TLS on all TCP addresses but those written http:ADDRESS:PORT (repeatable)
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Vec<PathBuf>,
    /// The private key of each certificate, as PEM (repeatable)
    #[arg(long, value_name = "FILE")]
    pub tls_key: Vec<PathBuf>,
    /// Ask clients for certificates, by these authorities (PEM); one that has none is served too
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Expect each TCP connection to begin with a PROXY header, version 1 or 2
    #[arg(long)]
    pub proxy_protocol: bool,
    /// Proxies whose headers about the client are believed: a network, an address, or unix (repeatable)
    #[arg(long, value_name = "CIDR")]
    pub trusted_proxy: Vec<String>,
    /// The headers that trusted proxies set; all others about the client are removed
    #[arg(long, value_enum, default_value_t)]
    pub forwarded: Dialect,
    /// Proxies that a request passes, each of which adds to these headers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = within(1..=u8::MAX))]
    pub forwarded_hops: u8,
    /// Serve the files of a directory under a path, without the app (repeatable)
    #[arg(long = "static", value_name = "/PATH=DIR")]
    pub static_files: Vec<String>,
    /// Compress text responses by brotli or gzip for clients that accept it
    #[arg(long)]
    pub compress: bool,
    /// Log each request in this form
    #[arg(long, value_enum, default_value_t)]
    pub access_log: access_log::Format,
    /// The file to append the access log to [default: standard error]
    #[arg(long, value_name = "FILE")]
    pub access_log_file: Option<PathBuf>,
}

/// Options for an app that is built before it is used.
#[derive(Debug, Default, Args)]
pub struct SourceArgs {
    #[command(flatten)]
    pub build: ProjectArgs,
    /// A variable for the build only (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_variable, help_heading = "Build options")]
    pub build_env: Vec<(String, String)>,
}

impl SourceArgs {
    /// The name of an option that was given, if any.
    pub fn given(&self) -> Option<&'static str> {
        [
            (self.build.dir.is_some(), "--dir"),
            (self.build.requirements.is_some(), "--requirements"),
            (!self.build.warmup.is_empty(), "--warmup"),
            (!self.build.exclude.is_empty(), "--exclude"),
            (!self.build_env.is_empty(), "--build-env"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }
}

/// What an app's instances may use.
#[derive(Debug, Args)]
pub struct GrantArgs {
    /// Memory of one instance
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = within(bounds::MEMORY))]
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
    /// How much of the code is shared with other apps, to compare the ways
    #[arg(long, value_enum, hide = true)]
    pub code: Option<Sharing>,
    /// What the app may connect to by TCP: HOST:PORT, *.DOMAIN:PORT, ADDRESS:PORT or
    /// ADDRESS/BITS:PORT, with port * for any (repeatable)
    #[arg(long, value_name = "HOST:PORT")]
    pub network: Vec<Rule>,
    /// Bytes that the app may send and receive over its connections in an hour
    #[arg(long, value_name = "SIZE", default_value = "64GiB")]
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
    #[arg(long, value_name = "TIME", value_parser = within(bounds::TIME))]
    pub timeout: Option<Time>,
    #[command(flatten)]
    pub project: SourceArgs,
    /// The command: `python FILE ...`, `python -m MODULE ...` or `python -c CODE ...`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Options of `written-pages`.
#[derive(Debug, Args)]
pub struct WrittenPagesArgs {
    /// The built app
    pub app: String,
    /// What to ask it for
    pub paths: Vec<String>,
    #[command(flatten)]
    pub grants: GrantArgs,
    #[command(flatten)]
    pub project: SourceArgs,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The configuration file, or a directory with apps and their settings
    #[arg(value_name = "FILE | DIR")]
    pub file: Option<PathBuf>,
    /// Print the JSON schema of configuration files
    #[arg(long)]
    pub schema: bool,
}

/// Options of `ctl`.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// The server's control socket, as its configuration names it
    #[arg(long, value_name = "unix:PATH")]
    pub control: String,
    /// What to ask or do.
    #[command(subcommand)]
    pub command: ControlCommand,
}

/// What `ctl` can do.
#[derive(Debug, Subcommand)]
pub enum ControlCommand {
    /// Show the tenants and their state
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a tenant's last failures
    Errors {
        /// Its name
        tenant: String,
    },
    /// Let a built app take the place of a tenant's, if it starts and answers
    Deploy {
        /// Its name
        tenant: String,
        /// The built app
        app: PathBuf,
    },
    /// Let a tenant's version before take its place again
    Rollback {
        /// Its name
        tenant: String,
    },
    /// Refuse a tenant's requests, and return when those in work are done
    Drain {
        /// Its name
        tenant: String,
    },
    /// Refuse a tenant's requests
    Suspend {
        /// Its name
        tenant: String,
    },
    /// Take a tenant's requests again
    Resume {
        /// Its name
        tenant: String,
    },
    /// Read the configuration again
    Reload,
}

/// What to do with the cache.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Show what is in it, the least recently used first
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove what was not used for long; whoever needs it makes it again
    Prune {
        /// Time after which an entry is removed
        #[arg(long, value_name = "TIME", default_value = "30d")]
        unused: Time,
        /// Remove the least recently used entries until the rest fits
        #[arg(long, value_name = "SIZE")]
        max_size: Option<Size>,
    },
    /// Read everything, and remove what is not as it was made
    Verify,
    /// Optimize the code that an app shares with others by Binaryen's wasm-opt; once for each
    /// interpreter, and for servers that are started later
    Optimize {
        /// A built app that you trust
        #[arg(value_name = "APP.wasm")]
        app: PathBuf,
        /// The program to use
        #[arg(long, value_name = "FILE", default_value = "wasm-opt")]
        wasm_opt: PathBuf,
    },
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

/// Reads `unix:PATH`.
pub fn parse_control(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!("`{text}` has to be `unix:PATH`")),
    }
}

/// Reads the target of a warm-up request.
fn parse_warmup(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("a path to request begins with `/`, as in `/` or `/login?next=x`".into());
    }
    if text.chars().any(char::is_control) {
        return Err("it holds a control character; write that as `%0A` and the like".into());
    }
    Ok(text.into())
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
