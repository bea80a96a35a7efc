//! The one kind of error that a user can mend: bad input.
//!
//! Start-up code speaks [`anyhow`]. Where the cause lies in what the user gave
//! us (an option, a file, an app that does not import), the error carries a
//! [`UserError`], which decides the exit status and keeps the message short.

use std::fmt;

/// A message for the user: what is wrong, why, and what to do about it.
#[derive(Debug)]
pub struct UserError {
    message: String,
    remedy: Option<String>,
}

impl UserError {
    /// An error that names the thing and the reason in `message`.
    pub fn new(message: impl Into<String>) -> Self {
        UserError { message: message.into(), remedy: None }
    }

    /// Adds what the user can do, as a full sentence or a command.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n  help: {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for UserError {}

/// Exit status for bad input, as clap uses it for a bad command line.
pub const EXIT_USAGE: u8 = 2;
/// Exit status for a failure that is not the user's.
pub const EXIT_FAILURE: u8 = 1;

/// The exit status that fits `error`.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<UserError>()) { EXIT_USAGE } else { EXIT_FAILURE }
}
