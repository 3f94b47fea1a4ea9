//! The events of one call.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use crate::error::Error;
use crate::v1::generate_response::Event;
use crate::v1::load_model_response::Event as LoadEvent;
use crate::v1::{GenerationFinished, LoadFinished};

/// A stream of events; after an error it is over. Dropping it cancels the call.
pub struct EventStream<E> {
    events: Pin<Box<dyn Stream<Item = Result<E, Error>> + Send>>,
}

impl<E> EventStream<E> {
    pub(crate) fn new(events: impl Stream<Item = Result<E, Error>> + Send + 'static) -> Self {
        Self { events: Box::pin(events) }
    }

    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<E, Error>> {
        poll_fn(|context| self.events.as_mut().poll_next(context)).await
    }
}

impl EventStream<Event> {
    /// Read to the end, and return the last event, which has the whole text.
    pub async fn result(mut self) -> Result<GenerationFinished, Error> {
        let mut last = Err(Error::incomplete());
        while let Some(event) = self.next().await {
            if let Event::Finished(finished) = event? {
                last = Ok(finished);
            }
        }
        last
    }
}

impl EventStream<LoadEvent> {
    /// Read to the end, and return the last event.
    pub async fn result(mut self) -> Result<LoadFinished, Error> {
        let mut last = Err(Error::incomplete());
        while let Some(event) = self.next().await {
            if let LoadEvent::Finished(finished) = event? {
                last = Ok(finished);
            }
        }
        last
    }
}

impl<E> Stream for EventStream<E> {
    type Item = Result<E, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(context)
    }
}

impl<E> fmt::Debug for EventStream<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
