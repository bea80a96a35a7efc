//! What a guest writes to its standard output and error, as lines of our log.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

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

/// How many lines may be logged in a second, on average over [`BURST`] of
/// them. One for each app: neither its own lines nor ours about it may drown
/// those about others, or keep the host busy.
#[derive(Debug)]
pub struct LineBudget {
    per_second: u32,
    state: Mutex<Spent>,
}

/// Seconds whose lines may come at once.
const BURST: f64 = 5.0;

#[derive(Debug)]
struct Spent {
    left: f64,
    filled_at: Instant,
    /// Lines that were refused since the last one that was not.
    dropped: u64,
}

impl LineBudget {
    /// So many lines in a second.
    pub fn new(per_second: u32) -> LineBudget {
        let state = Spent { left: f64::from(per_second) * BURST, filled_at: Instant::now(), dropped: 0 };
        LineBudget { per_second, state: Mutex::new(state) }
    }

    /// Takes one line out of the budget and says how many had to be dropped
    /// before it; none if it must be dropped too.
    pub fn take(&self) -> Option<u64> {
        let mut spent = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, rate) = (Instant::now(), f64::from(self.per_second));
        let gained = now.duration_since(spent.filled_at).as_secs_f64() * rate;
        spent.left = (spent.left + gained).min(rate * BURST);
        spent.filled_at = now;
        if spent.left < 1.0 {
            spent.dropped += 1;
            return None;
        }
        spent.left -= 1.0;
        Some(std::mem::take(&mut spent.dropped))
    }
}

/// Text of a guest's, made fit for our log: at most so many bytes of it, and
/// no control characters, which could forge lines or drive the operator's
/// terminal.
pub struct Printable<'a>(pub &'a str, pub usize);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        let Printable(text, most) = self;
        let shown = &text[..text.floor_char_boundary(*most)];
        for c in shown.chars() {
            if c.is_control() && c != '\t' {
                write!(f, "{}", c.escape_default())?;
            } else {
                f.write_char(c)?;
            }
        }
        if shown.len() < text.len() { f.write_str(" [cut]") } else { Ok(()) }
    }
}

/// The log of one instance. Clones write to the same one.
#[derive(Clone, Debug)]
pub struct GuestLog(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    app: Arc<str>,
    budget: Arc<LineBudget>,
    request: Option<RequestId>,
    /// A line whose end has not come yet.
    line: Vec<u8>,
    /// Whether `line` is full and the rest is dropped.
    cut: bool,
    lines: u32,
}

impl GuestLog {
    /// A log whose lines name `app` and are within `budget`.
    pub fn new(app: Arc<str>, budget: Arc<LineBudget>) -> GuestLog {
        let state = State { app, budget, request: None, line: Vec::new(), cut: false, lines: 0 };
        GuestLog(Arc::new(Mutex::new(state)))
    }

    /// Logs each line of `text`, as if the guest had written it.
    pub fn explain(&self, text: &str) {
        self.with(|state| {
            state.end_line();
            state.write(text.as_bytes());
            state.end_line();
        });
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
        match self.budget.take() {
            None => return,
            Some(0) => {}
            Some(dropped) => {
                tracing::warn!(target: "app", app = %self.app, "[{dropped} lines were dropped: too many in a second]");
            }
        }
        let text = String::from_utf8_lossy(&self.line);
        let (text, end) = (Printable(&text, usize::MAX), if self.cut { " [cut]" } else { "" });
        match self.request {
            Some(request) => tracing::info!(target: "app", app = %self.app, %request, "{text}{end}"),
            None => tracing::info!(target: "app", app = %self.app, "{text}{end}"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_lets_a_burst_pass_and_counts_the_rest() {
        let budget = LineBudget::new(2);
        let granted = (0..100).filter(|_| budget.take().is_some()).count();
        // A slow machine may earn one or two more on the way.
        assert!((10..20).contains(&granted), "{granted}");
        let earlier = Instant::now().checked_sub(std::time::Duration::from_secs(2)).unwrap();
        budget.state.lock().unwrap().filled_at = earlier;
        assert_eq!(budget.take(), Some(100 - granted as u64));
        assert_eq!(budget.take(), Some(0));
    }

    #[test]
    fn what_a_guest_says_stays_one_line() {
        assert_eq!(Printable("a\tb\r\n\x1b[31mc\u{85}", 100).to_string(), "a\tb\\r\\n\\u{1b}[31mc\\u{85}");
        assert_eq!(Printable("caf\u{e9}", 4).to_string(), "caf [cut]");
    }
}
