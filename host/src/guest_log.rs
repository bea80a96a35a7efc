//! What a guest writes to its standard output and error, as lines of our log.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use crate::request_id::RequestId;

/// A line longer than this is cut; the rest of it is dropped.
const MAX_LINE: usize = 8 << 10;
/// Lines that one request may log. A traceback has dozens; a guest that
/// writes more would drown its neighbours' lines.
const MAX_LINES: u32 = 1000;

/// The log of one instance. Clones write to the same one.
#[derive(Clone, Debug)]
pub struct GuestLog(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    app: Arc<str>,
    request: Option<RequestId>,
    /// A line whose end has not come yet.
    line: Vec<u8>,
    /// Whether `line` is full and the rest is dropped.
    cut: bool,
    lines: u32,
}

impl GuestLog {
    /// A log whose lines name `app`.
    pub fn new(app: Arc<str>) -> GuestLog {
        GuestLog(Arc::new(Mutex::new(State { app, request: None, line: Vec::new(), cut: false, lines: 0 })))
    }

    /// Lines from here on belong to `request`.
    pub fn begin(&self, request: RequestId) {
        self.with(|state| {
            state.request = Some(request);
            state.lines = 0;
        });
    }

    /// The request is over: writes out a line that has no end.
    pub fn end(&self) {
        self.with(|state| {
            state.end_line();
            state.request = None;
        });
    }

    fn with(&self, act: impl FnOnce(&mut State)) {
        // A panic while the lock was held left at worst a line cut in two.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl State {
    fn write(&mut self, bytes: &[u8]) {
        for (index, part) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if index > 0 {
                self.end_line();
            }
            let room = MAX_LINE - self.line.len();
            self.cut |= part.len() > room;
            self.line.extend_from_slice(&part[..part.len().min(room)]);
        }
    }

    fn end_line(&mut self) {
        if !self.line.is_empty() {
            self.lines = self.lines.saturating_add(1);
            if self.lines <= MAX_LINES {
                self.emit();
            } else if self.lines == MAX_LINES + 1 {
                self.line = b"[more lines of this request are dropped]".to_vec();
                self.cut = false;
                self.emit();
            }
        }
        self.line.clear();
        self.cut = false;
    }

    fn emit(&self) {
        // Control characters could forge lines or drive the operator's terminal.
        let mut text: String = String::from_utf8_lossy(&self.line)
            .chars()
            .flat_map(|c| {
                let escape = c.is_control() && c != '\t';
                let plain = (!escape).then_some(c);
                plain.into_iter().chain(c.escape_default().filter(move |_| escape))
            })
            .collect();
        if self.cut {
            text.push_str(" [cut]");
        }
        match self.request {
            Some(request) => tracing::info!(target: "app", app = %self.app, %request, "{text}"),
            None => tracing::info!(target: "app", app = %self.app, "{text}"),
        }
    }
}

impl IsTerminal for GuestLog {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestLog {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Only WASI 0.3 asks for this form, which is not linked.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for GuestLog {
    async fn ready(&mut self) {}
}

impl OutputStream for GuestLog {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.with(|state| state.write(&bytes));
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 << 10)
    }
}
