//! When a call is tried again: UNAVAILABLE, before any message, at most four times.

use std::error::Error as _;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Request, Status};

use crate::error::Error;

const MAX_ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
// The server's own deadline is a little later, so that this side's decides.
const GRACE: Duration = Duration::from_millis(50);

/// The attempts of one call, and its deadline.
#[derive(Clone)]
pub(crate) struct Attempts {
    deadline: Option<Instant>,
    waits_for_ready: bool,
    made: u32,
}

impl Attempts {
    pub(crate) fn new(timeout: Option<Duration>, waits_for_ready: bool) -> Self {
        Self {
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            waits_for_ready,
            made: 0,
        }
    }

    /// The message as a request that tells the server the deadline.
    pub(crate) fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()) + GRACE);
        }
        request
    }

    /// Wait for `work` until the deadline.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        match self.deadline {
            None => Ok(work.await),
            Some(deadline) => timeout_at(deadline, work).await.map_err(|_| Error::deadline()),
        }
    }

    /// Return when it is time for the next attempt. Errors: the failure, if it was the last one.
    pub(crate) async fn again(&mut self, failure: Status) -> Result<(), Error> {
        let never_sent = is_connect_error(&failure);
        if !(never_sent && self.waits_for_ready) {
            self.made += 1;
        }
        if failure.code() != Code::Unavailable || self.made >= MAX_ATTEMPTS {
            return Err(failure.into());
        }
        let wait = match failure.metadata().get("grpc-retry-pushback-ms") {
            None => self.backoff(),
            // What is no number from 0 on is a no.
            Some(pushback) => match pushback.to_str().ok().and_then(|text| text.parse().ok()) {
                Some(wait_ms) => Duration::from_millis(wait_ms),
                None => return Err(failure.into()),
            },
        };
        self.in_time(sleep(wait)).await
    }

    /// 0.1 s, doubled each time, a fifth more or less.
    fn backoff(&self) -> Duration {
        let doubled = FIRST_BACKOFF * 2_u32.pow(self.made.saturating_sub(1).min(8));
        let random = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
        doubled.min(MAX_BACKOFF).mul_f64(0.8 + 0.4 * random)
    }
}

/// Whether no connection was made, so that the server never saw the call.
fn is_connect_error(failure: &Status) -> bool {
    failure.source().is_some_and(|source| source.is::<tonic::transport::Error>())
}
