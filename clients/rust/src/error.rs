//! From a gRPC status and its google.rpc details to the error of a call.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt;

const DOMAIN: &str = "mlxpool";

/// The contract's stable names for failures; a newer server may have others.
#[rustfmt::skip]
#[allow(missing_docs)]
pub mod reason {
    pub const INVALID_FIELD: &str = "INVALID_FIELD";
    pub const PROMPT_TOO_LONG: &str = "PROMPT_TOO_LONG";
    pub const BAD_CONSTRAINT: &str = "BAD_CONSTRAINT";
    pub const MODEL_NOT_FOUND: &str = "MODEL_NOT_FOUND";
    pub const ADAPTER_NOT_FOUND: &str = "ADAPTER_NOT_FOUND";
    pub const GENERATION_NOT_FOUND: &str = "GENERATION_NOT_FOUND";
    pub const GENERATION_ID_IN_USE: &str = "GENERATION_ID_IN_USE";
    pub const MODEL_NOT_LOADED: &str = "MODEL_NOT_LOADED";
    pub const CAPABILITY_MISSING: &str = "CAPABILITY_MISSING";
    pub const MODEL_IN_USE: &str = "MODEL_IN_USE";
    pub const MEMORY_IN_USE: &str = "MEMORY_IN_USE";
    pub const API_KEY_MISSING: &str = "API_KEY_MISSING";
    pub const API_KEY_INVALID: &str = "API_KEY_INVALID";
    pub const ROLE_MISSING: &str = "ROLE_MISSING";
    pub const POOL_MEMORY_LIMIT: &str = "POOL_MEMORY_LIMIT";
    pub const RATE_LIMITED: &str = "RATE_LIMITED";
    pub const TOO_MANY_STREAMS: &str = "TOO_MANY_STREAMS";
    pub const LOAD_SUPERSEDED: &str = "LOAD_SUPERSEDED";
    pub const MODEL_UNLOADED: &str = "MODEL_UNLOADED";
    pub const QUEUE_FULL: &str = "QUEUE_FULL";
    pub const DRAINING: &str = "DRAINING";
    pub const DEADLINE_UNMEETABLE: &str = "DEADLINE_UNMEETABLE";
    pub const QUEUE_TIMEOUT: &str = "QUEUE_TIMEOUT";
    pub const NOT_IMPLEMENTED: &str = "NOT_IMPLEMENTED";
    pub const LOAD_FAILED: &str = "LOAD_FAILED";
    pub const GENERATION_FAILED: &str = "GENERATION_FAILED";
    pub const INTERNAL: &str = "INTERNAL";
}

/// What is wrong with one field of a request; `field` is its path in the contract's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    pub field: String,
    pub description: String,
}

/// A failed call: what the server said, empty where it said nothing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Error {
    /// The gRPC status; `Code::Ok` for a stream that ended without its last event.
    pub code: Code,
    /// One of [`reason`]; empty for failures of gRPC itself or of something in between.
    pub reason: String,
    pub message: String,
    /// The facts behind the reason; `requiredBytes` and the like are decimal texts.
    pub metadata: BTreeMap<String, String>,
    pub field_violations: Vec<FieldViolation>,
    /// After how long the server suggests to come back.
    pub retry_after: Option<Duration>,
}

impl Error {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: String::new(),
            message: message.into(),
            metadata: BTreeMap::new(),
            field_violations: Vec::new(),
            retry_after: None,
        }
    }

    pub(crate) fn incomplete() -> Self {
        Self::new(Code::Ok, "the stream ended without its finished event")
    }

    pub(crate) fn deadline() -> Self {
        Self::new(Code::DeadlineExceeded, "the call's timeout passed")
    }

    /// Whether a stream with status OK lacked its last event: treat the output as cut off.
    pub fn is_incomplete(&self) -> bool {
        self.code == Code::Ok
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let mut error = Self::new(status.code(), status.message());
        // Details that were mangled on the way leave the code and the message.
        let details = status.get_error_details();
        if let Some(info) = details.error_info().filter(|info| info.domain == DOMAIN) {
            error.reason.clone_from(&info.reason);
            error.metadata = info.metadata.clone().into_iter().collect();
        }
        if let Some(request) = details.bad_request() {
            let violations = request.field_violations.iter();
            error.field_violations = violations
                .map(|each| FieldViolation {
                    field: each.field.clone(),
                    description: each.description.clone(),
                })
                .collect();
        }
        error.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        error
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason.as_str() {
            "" => write!(f, "{:?}: {}", self.code, self.message),
            reason => write!(f, "{reason}: {}", self.message),
        }
    }
}

impl std::error::Error for Error {}
