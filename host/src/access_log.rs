//! The access log: one line per request, in the combined format of Apache and
//! nginx or as JSON.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::UserError;

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The combined format, then app, request id and times.
    Combined,
    /// One JSON object.
    Json,
    /// No access log.
    #[default]
    Off,
}

/// Where the lines go.
pub struct AccessLog {
    format: Format,
    /// The file; none for standard error.
    path: Option<PathBuf>,
    sink: Mutex<Box<dyn Write + Send>>,
}

/// A request that was answered.
pub struct Line<'a> {
    /// When it came.
    pub time: SystemTime,
    /// The client's address; none on a unix socket.
    pub client: Option<std::net::IpAddr>,
    /// The method; none, like the two that follow, if the head was not valid.
    pub method: Option<&'a str>,
    /// The target.
    pub target: &'a str,
    /// The version of HTTP.
    pub protocol: &'a str,
    /// `Host`.
    pub host: Option<&'a [u8]>,
    /// `Referer`.
    pub referer: Option<&'a [u8]>,
    /// `User-Agent`.
    pub user_agent: Option<&'a [u8]>,
    /// The status.
    pub status: u16,
    /// Bytes of the response's body.
    pub bytes: u64,
    /// Whether it went out whole.
    pub is_whole: bool,
    /// The app.
    pub app: &'a str,
    /// The request's id.
    pub request: &'a dyn fmt::Display,
    /// From the request's head to the end of the response.
    pub total: Duration,
    /// The wait for an instance.
    pub queued: Duration,
    /// The work of the instance.
    pub guest: Duration,
}

impl AccessLog {
    /// A log to `file`, or to standard error. None if it is off.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if the file can not be opened.
    pub fn open(format: Format, file: Option<&Path>) -> Result<Option<AccessLog>, UserError> {
        if format == Format::Off {
            return Ok(None);
        }
        let sink = open(file).map_err(|error| {
            let path = file.unwrap_or(Path::new("-")).display();
            UserError::new(format!("can not write the access log `{path}`: {error}"))
                .remedy("choose a file in a directory that exists and can be written")
        })?;
        Ok(Some(AccessLog { format, path: file.map(Path::to_owned), sink: Mutex::new(sink) }))
    }

    /// Opens the file anew, after the old one was moved away. If that is not
    /// possible, the old one stays in use.
    pub fn reopen(&self) {
        match open(self.path.as_deref()) {
            Ok(sink) => *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink,
            Err(error) => tracing::error!("can not open the access log anew: {error}"),
        }
    }

    /// Writes a line. One that can not be written is lost: a full disk must
    /// not stop the server.
    pub fn write(&self, line: &Line<'_>) {
        let mut text = match self.format {
            Format::Json => line.json(),
            _ => line.combined(),
        };
        text.push('\n');
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = sink.write_all(text.as_bytes());
    }
}

fn open(path: Option<&Path>) -> io::Result<Box<dyn Write + Send>> {
    Ok(match path {
        None => Box::new(io::stderr()),
        Some(path) => Box::new(std::fs::OpenOptions::new().append(true).create(true).open(path)?),
    })
}

impl Line<'_> {
    fn combined(&self) -> String {
        let mut text = String::with_capacity(256);
        match self.client {
            Some(client) => _ = write!(text, "{client}"),
            None => text.push_str("unix:"),
        }
        _ = write!(text, " - - [{}] \"", clf_time(self.time));
        match self.method {
            Some(method) => {
                escape(&mut text, method.as_bytes());
                text.push(' ');
                escape(&mut text, self.target.as_bytes());
                _ = write!(text, " {}", self.protocol);
            }
            None => text.push('-'),
        }
        _ = write!(text, "\" {} {} \"", self.status, self.bytes);
        escape(&mut text, self.referer.unwrap_or(b"-"));
        text.push_str("\" \"");
        escape(&mut text, self.user_agent.unwrap_or(b"-"));
        _ = write!(
            text,
            "\" app={} request={} total={:.6} queue={:.6} guest={:.6}{}",
            if self.app.is_empty() { "-" } else { self.app },
            self.request,
            self.total.as_secs_f64(),
            self.queued.as_secs_f64(),
            self.guest.as_secs_f64(),
            if self.is_whole { "" } else { " cut" },
        );
        text
    }

    fn json(&self) -> String {
        let text = |bytes: Option<&[u8]>| bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let seconds = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e6;
        serde_json::json!({
            "time": rfc3339(self.time),
            "client": self.client.map(|client| client.to_string()),
            "method": self.method,
            "target": self.method.map(|_| self.target),
            "protocol": self.method.map(|_| self.protocol),
            "host": text(self.host),
            "referer": text(self.referer),
            "user_agent": text(self.user_agent),
            "status": self.status,
            "bytes": self.bytes,
            "whole": self.is_whole,
            "app": Some(self.app).filter(|app| !app.is_empty()),
            "request": self.request.to_string(),
            "total": seconds(self.total),
            "queue": seconds(self.queued),
            "guest": seconds(self.guest),
        })
        .to_string()
    }
}

/// Adds text of a client such that it can end neither a field nor a line.
fn escape(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        match byte {
            b'"' | b'\\' => {
                text.push('\\');
                text.push(char::from(*byte));
            }
            b' '..=b'~' => text.push(char::from(*byte)),
            byte => _ = write!(text, "\\x{byte:02x}"),
        }
    }
}

/// Year, month, day, hour, minute and second of a time, in UTC.
fn civil(time: SystemTime) -> (i64, usize, u64, u64, u64, u64) {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (i64::try_from(seconds / 86_400).unwrap_or_default(), seconds % 86_400);
    // Days since 1 March of the year 0, in eras of 400 years: leap days come
    // last in a year that begins with March.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (month, day) = (usize::try_from(month).unwrap_or(1), u64::try_from(day).unwrap_or(1));
    (year, month, day, rest / 3600, rest / 60 % 60, rest % 60)
}

fn clf_time(time: SystemTime) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (year, month, day, hour, minute, second) = civil(time);
    let month = MONTHS.get(month - 1).unwrap_or(&"Jan");
    format!("{day:02}/{month}/{year}:{hour:02}:{minute:02}:{second:02} +0000")
}

fn rfc3339(time: SystemTime) -> String {
    let (year, month, day, hour, minute, second) = civil(time);
    let milliseconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_right_on_leap_days_and_at_the_ends_of_years() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert_eq!(clf_time(UNIX_EPOCH + Duration::from_secs(951_782_401)), "29/Feb/2000:00:00:01 +0000");
    }

    #[test]
    fn a_client_can_forge_neither_a_field_nor_a_line() {
        let mut text = String::new();
        escape(&mut text, b"a\" 200 \\ \n\x1b[31m\xff");
        assert_eq!(text, r#"a\" 200 \\ \x0a\x1b[31m\xff"#);
    }
}
