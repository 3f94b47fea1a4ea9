//! Calls mlxpool servers: tokens as they come, typed errors, retries by the contract's rules.
//!
//! ```no_run
//! # async fn example() -> Result<(), mlxpool::Error> {
//! use mlxpool::{Client, Event, GenerateRequest, delta_text, user};
//!
//! let client = Client::new("127.0.0.1:50051")?;
//! let mut events = client.generate(GenerateRequest::chat("demo", [user("Name three colours.")]));
//! while let Some(event) = events.next().await {
//!     if let Event::Delta(delta) = event? {
//!         print!("{}", delta_text(&delta));
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Requests and events are the contract's own messages ([`v1`]); failures are [`Error`].

mod attempts;
mod client;
mod error;
mod options;
mod requests;
mod stream;

/// The contract, as it is generated.
#[allow(clippy::all, missing_docs)]
pub mod v1 {
    include!("gen/mlxpool.v1.rs");
}

pub use client::Client;
pub use error::{Error, FieldViolation, reason};
pub use options::{DEFAULT_TARGET, Options, Tls};
pub use requests::{assistant, delta_text, message_text, system, tool_result, user};
pub use stream::EventStream;
pub use tonic::Code;
/// The events of a generation: one `Started`, any `Progress` and `Delta`, then one `Finished`.
pub use v1::generate_response::Event;
/// The events of a load: any `Progress`, then one `Finished`.
pub use v1::load_model_response::Event as LoadEvent;
pub use v1::{ChatMessage, GenerateRequest, LoadModelRequest, SamplingParams, StopConditions};
