//! Why a request failed, and the one place that decides what the client sees.

use std::fmt;

use http::StatusCode;

/// The cause of a failed request. Nothing of a guest's text is in what a
/// client gets: tracebacks and paths go to the log, under the request's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The request breaks a rule that an app could not handle: the reason.
    BadRequest(&'static str),
    /// The request is refused with this status: the reason.
    Refused(StatusCode, &'static str),
    /// The request body is larger than the app's limit.
    BodyTooLarge,
    /// The client sent no byte of its body for too long, or too few.
    BodyTimeout,
    /// No tenant answers for the host (RFC 9110 section 15.5.20).
    UnknownHost,
    /// No tenant of the host is mounted above the path.
    NoTenant,
    /// The tenant's app could not be loaded.
    NotLoaded,
    /// The operator has suspended the tenant.
    Suspended,
    /// The tenant crashed too often in a row; the seconds until it may again.
    CrashLoop(u64),
    /// The tenant has used up its processor time; the seconds until there is
    /// some again.
    BudgetExhausted(u64),
    /// More requests came than the tenant may have in a second.
    TooManyRequests,
    /// The tenant holds as much memory as it may.
    MemoryExhausted,
    /// All instances are busy and the queue is full, or the wait was too long.
    Overloaded,
    /// No instance could be started.
    CannotStart,
    /// The app raised, or returned without a response. It has logged why.
    App,
    /// The response breaks a rule of HTTP or of the WIT contract: the rule.
    BadResponse(&'static str),
    /// The app did not answer, or not go on, within its time limit.
    Timeout,
    /// The guest trapped.
    Trap,
    /// The client left before the response was complete.
    ClientGone,
}

impl Failure {
    /// The status line for the client, if the head is not out yet.
    pub fn status(self) -> StatusCode {
        match self {
            Failure::BadRequest(_) => StatusCode::BAD_REQUEST,
            Failure::Refused(status, _) => status,
            Failure::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Failure::BodyTimeout | Failure::ClientGone => StatusCode::REQUEST_TIMEOUT,
            Failure::UnknownHost => StatusCode::MISDIRECTED_REQUEST,
            Failure::NoTenant => StatusCode::NOT_FOUND,
            Failure::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Failure::Overloaded
            | Failure::MemoryExhausted
            | Failure::CannotStart
            | Failure::NotLoaded
            | Failure::Suspended
            | Failure::CrashLoop(_)
            | Failure::BudgetExhausted(_) => StatusCode::SERVICE_UNAVAILABLE,
            Failure::App | Failure::BadResponse(_) | Failure::Trap => StatusCode::INTERNAL_SERVER_ERROR,
            Failure::Timeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Seconds after which another try makes sense, for `Retry-After`.
    pub fn retry_after(self) -> Option<u64> {
        match self {
            Failure::Overloaded
            | Failure::MemoryExhausted
            | Failure::CannotStart
            | Failure::TooManyRequests => Some(1),
            Failure::NotLoaded | Failure::Suspended => Some(60),
            Failure::CrashLoop(seconds) | Failure::BudgetExhausted(seconds) => Some(seconds),
            _ => None,
        }
    }

    /// Whether the operator or the app's developer should hear of it.
    pub fn is_servers_fault(self) -> bool {
        self.status().is_server_error()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::BadRequest(reason) => write!(f, "bad request: {reason}"),
            Failure::Refused(_, reason) => write!(f, "request refused: {reason}"),
            Failure::BodyTooLarge => f.write_str("the request body is larger than the limit"),
            Failure::BodyTimeout => f.write_str("the client sent its body too slowly"),
            Failure::UnknownHost => f.write_str("no tenant answers for this host"),
            Failure::NoTenant => f.write_str("no tenant is mounted at this path"),
            Failure::NotLoaded => f.write_str("the tenant's app could not be loaded"),
            Failure::Suspended => f.write_str("the tenant is suspended"),
            Failure::CrashLoop(_) => f.write_str("the tenant crashes again and again"),
            Failure::BudgetExhausted(_) => f.write_str("the tenant has used up its processor time"),
            Failure::TooManyRequests => f.write_str("more requests than the tenant may have in a second"),
            Failure::MemoryExhausted => f.write_str("the tenant holds as much memory as it may"),
            Failure::Overloaded => f.write_str("all instances are busy"),
            Failure::CannotStart => f.write_str("no instance could be started"),
            Failure::App => f.write_str("the app failed"),
            Failure::BadResponse(rule) => write!(f, "the app's response is not valid: {rule}"),
            Failure::Timeout => f.write_str("the app did not answer in time"),
            Failure::Trap => f.write_str("the guest trapped"),
            Failure::ClientGone => f.write_str("the client closed the connection"),
        }
    }
}

impl std::error::Error for Failure {}
