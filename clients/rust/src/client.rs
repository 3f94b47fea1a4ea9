//! A connection to one server, and its calls.

use std::fmt;
use std::time::Duration;

use async_stream::try_stream;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::attempts::Attempts;
use crate::error::Error;
use crate::options::{Bearer, Options};
use crate::stream::EventStream;
use crate::v1::generate_response::Event;
use crate::v1::load_model_response::Event as LoadEvent;
use crate::v1::memory_service_client::MemoryServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::v1::*;

const MAX_RECEIVE_BYTES: usize = 64 << 20;

type Service = InterceptedService<Channel, Bearer>;

/// A connection to one server, cheap to clone; it connects with the first call.
///
/// UNAVAILABLE is retried up to three times, and only as long as no message has arrived: an answer
/// never starts twice.
#[derive(Clone)]
pub struct Client {
    target: String,
    endpoint: Endpoint,
    models: ModelServiceClient<Service>,
    memory: MemoryServiceClient<Service>,
    timeout: Option<Duration>,
    waits_for_ready: bool,
}

/// Calls that answer once.
macro_rules! unary {
    ($($(#[$doc:meta])* $service:ident.$name:ident($request:ty) -> $response:ty;)*) => {
        $($(#[$doc])*
        pub async fn $name(&self, request: $request) -> Result<$response, Error> {
            let mut attempts = self.attempts();
            loop {
                let mut service = self.$service.clone();
                let call = service.$name(attempts.request(request.clone()));
                match attempts.in_time(call).await? {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(failure) => attempts.again(failure).await?,
                }
            }
        })*
    };
}

/// Calls that answer with events.
macro_rules! streaming {
    ($($(#[$doc:meta])* $name:ident = $method:ident($request:ty) -> $event:ident;)*) => {
        $($(#[$doc])*
        pub fn $name(&self, request: $request) -> EventStream<$event> {
            let client = self.clone();
            EventStream::new(try_stream! {
                let mut attempts = client.attempts();
                let (mut responses, mut next) = loop {
                    let mut models = client.models.clone();
                    let call = models.$method(attempts.request(request.clone()));
                    let first = async { first_message(call.await?.into_inner()).await };
                    match attempts.in_time(first).await? {
                        Ok(started) => break started,
                        Err(failure) => attempts.again(failure).await?,
                    }
                };
                let mut has_finished = false;
                while let Some(response) = next {
                    // An event without a kind comes from a newer server.
                    if let Some(event) = response.event {
                        has_finished |= matches!(event, $event::Finished(_));
                        yield event;
                    }
                    next = attempts.in_time(responses.message()).await??;
                }
                if !has_finished {
                    Err(Error::incomplete())?;
                }
            })
        })*
    };
}

async fn first_message<M>(
    mut responses: Streaming<M>,
) -> Result<(Streaming<M>, Option<M>), Status> {
    let first = responses.message().await?;
    Ok((responses, first))
}

impl Client {
    /// A client for `"host:port"`, without TLS. Needs a Tokio runtime.
    ///
    /// Errors: INVALID_ARGUMENT for what is no address.
    pub fn new(target: &str) -> Result<Self, Error> {
        Self::with_options(target, &Options::default())
    }

    /// A client for `"host:port"` or `"unix:path"`. Needs a Tokio runtime.
    ///
    /// Errors: INVALID_ARGUMENT for what is no address, certificate or key, and for a key that
    /// would leave this machine in plaintext.
    pub fn with_options(target: &str, options: &Options) -> Result<Self, Error> {
        let endpoint = options.endpoint(target)?;
        let bearer = options.bearer(target)?;
        let service = InterceptedService::new(endpoint.connect_lazy(), bearer);
        Ok(Self {
            target: target.to_owned(),
            endpoint,
            models: ModelServiceClient::new(service.clone())
                .max_decoding_message_size(MAX_RECEIVE_BYTES),
            memory: MemoryServiceClient::new(service).max_decoding_message_size(MAX_RECEIVE_BYTES),
            timeout: options.timeout,
            waits_for_ready: options.wait_for_ready,
        })
    }

    /// The same connection, for calls with a deadline of their own.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self.clone() }
    }

    /// Wait until the server can be connected to.
    ///
    /// Errors: UNAVAILABLE when it cannot within `timeout`.
    pub async fn wait_until_ready(&self, timeout: Duration) -> Result<(), Error> {
        let connected = async {
            while self.endpoint.connect().await.is_err() {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout_at(Instant::now() + timeout, connected).await.map_err(|_| {
            let message = format!("nothing answered at {} within {timeout:?}", self.target);
            Error::new(Code::Unavailable, message)
        })
    }

    streaming! {
        /// Stream one generation. It starts when the stream is first polled; dropping the stream
        /// cancels it and frees its slot.
        generate = generate(GenerateRequest) -> Event;
        /// Load a model, or watch a load that runs already. Dropping the stream stops watching, not
        /// loading: only `unload_model` stops a load.
        load = load_model(LoadModelRequest) -> LoadEvent;
    }

    unary! {
        /// Models by page, with their states.
        models.list_models(ListModelsRequest) -> ListModelsResponse;
        /// One model.
        models.get_model(GetModelRequest) -> GetModelResponse;
        /// Drain and free a model.
        models.unload_model(UnloadModelRequest) -> UnloadModelResponse;
        /// End a generation that somebody else reads.
        models.cancel_generation(CancelGenerationRequest) -> CancelGenerationResponse;
        /// The tokens that a generation would see.
        models.tokenize(TokenizeRequest) -> TokenizeResponse;
        /// How many tokens a generation would see.
        models.count_tokens(CountTokensRequest) -> CountTokensResponse;
        /// Embeddings of prompts.
        models.embed(EmbedRequest) -> EmbedResponse;
        /// Versions and device.
        models.get_server_info(GetServerInfoRequest) -> GetServerInfoResponse;
        /// The memory in use now.
        memory.get_memory_usage(GetMemoryUsageRequest) -> GetMemoryUsageResponse;
        /// Change limits.
        memory.set_memory_limits(SetMemoryLimitsRequest) -> SetMemoryLimitsResponse;
        /// Free caches.
        memory.clear_cache(ClearCacheRequest) -> ClearCacheResponse;
        /// Start a new peak.
        memory.reset_peak_memory(ResetPeakMemoryRequest) -> ResetPeakMemoryResponse;
    }

    fn attempts(&self) -> Attempts {
        Attempts::new(self.timeout, self.waits_for_ready)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("target", &self.target).finish_non_exhaustive()
    }
}
