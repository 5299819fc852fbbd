//! What a worker offers, said and checked before it talks to anybody.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
#[cfg(feature = "metrics")]
use tasker_shared::metrics::Listen;
#[cfg(feature = "otlp")]
use tasker_shared::trace::config::Sources;

use crate::context::{Capture, StepContext};
use crate::error::StepError;
use crate::handler::Typed;
use crate::handlers::{self, Http};
use crate::registry::Registry;
use crate::runtime::{Error, Worker};

/// Says what a worker offers. Made by [`Worker::builder`].
pub struct Builder {
    url: String,
    namespace: String,
    queues: Vec<Option<String>>,
    registry: Registry,
    builtins: bool,
    http_hosts: Vec<String>,
    slots: usize,
    drain_timeout: Duration,
    cancel_grace: Duration,
    name: Option<String>,
    version: String,
    #[cfg(feature = "metrics")]
    metrics: Option<Listen>,
    capture: Capture,
    #[cfg(feature = "otlp")]
    trace_settings: Option<Sources>,
}

impl Worker {
    /// A worker for the database at this URL. It opens connections of its own, because claims
    /// and reports need different session settings.
    pub fn builder(url: impl Into<String>) -> Builder {
        Builder::new(url.into())
    }
}

impl Builder {
    /// With the defaults for everything but the database.
    pub(crate) fn new(url: String) -> Self {
        Self {
            url,
            namespace: "default".into(),
            queues: Vec::new(),
            registry: Registry::default(),
            builtins: false,
            http_hosts: Vec::new(),
            slots: 50,
            drain_timeout: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(10),
            name: None,
            version: env!("CARGO_PKG_VERSION").into(),
            #[cfg(feature = "metrics")]
            metrics: None,
            capture: Capture::default(),
            #[cfg(feature = "otlp")]
            trace_settings: None,
        }
    }

    /// The namespace whose steps it runs; `default` if not given.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// A queue that it reads: `None` is the namespace's own, `Some("slow")` the one of steps
    /// with `queue: slow`. May be called again for more; without a call it reads `None`.
    #[must_use]
    pub fn queue(mut self, queue: Option<&str>) -> Self {
        let queue = queue.map(str::to_owned);
        if !self.queues.contains(&queue) {
            self.queues.push(queue);
        }
        self
    }

    /// A handler by the name that templates use. Steps of handlers that no worker offers stay
    /// in their queue.
    #[must_use]
    pub fn handler<F, Fut, I, O, E>(mut self, name: impl Into<String>, function: F) -> Self
    where
        F: Fn(StepContext, I) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, E>> + Send + 'static,
        I: DeserializeOwned + 'static,
        O: Serialize + 'static,
        E: Into<StepError> + 'static,
    {
        self.registry.insert(name.into(), Typed::new(function));
        self
    }

    /// The handlers of [`handlers`](crate::handlers): `noop`, `echo`, `sleep`, `fail` and `http`.
    #[must_use]
    pub fn builtins(mut self) -> Self {
        self.builtins = true;
        self
    }

    /// Hosts that the built-in `http` handler may talk to, as `host` (ports 80 and 443) or
    /// `host:port`. Nothing is allowed otherwise.
    #[must_use]
    pub fn allow_http_hosts(mut self, hosts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.http_hosts.extend(hosts.into_iter().map(Into::into));
        self
    }

    /// Attempts that run at once; 50 if not given. A claim never takes more than there are
    /// free slots, so many slots suit many short steps.
    #[must_use]
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = slots;
        self
    }

    /// How long running handlers may take to finish after the shutdown token fired; 30 s if not given.
    #[must_use]
    pub fn drain_timeout(mut self, drain_timeout: Duration) -> Self {
        self.drain_timeout = drain_timeout;
        self
    }

    /// How long a handler may run on after its cancellation token fired; 10 s if not given.
    #[must_use]
    pub fn cancel_grace(mut self, cancel_grace: Duration) -> Self {
        self.cancel_grace = cancel_grace;
        self
    }

    /// Unique among all workers; `<host>-<pid>-<4 hex digits>` if not given.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The version of the program, shown on its spans; that of this crate if not given.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Serves the process's metrics there, at `/metrics`: `9464` on this machine only, or
    /// `0.0.0.0:9464`. Not served if not given.
    #[cfg(feature = "metrics")]
    #[must_use]
    pub fn metrics_listen(mut self, listen: Listen) -> Self {
        self.metrics = Some(listen);
        self
    }

    /// Keeps inputs or outputs of handlers with their attempts: redacted, and cut at 4 KiB. Not if not given.
    #[must_use]
    pub fn capture(mut self, capture: Capture) -> Self {
        self.capture = capture;
        self
    }

    /// Lets this process follow the trace settings that are stored in the database; see
    /// `tasker_shared::telemetry::start`. Without it the spans of handlers go where
    /// `telemetry::init` was told.
    #[cfg(feature = "otlp")]
    #[must_use]
    pub fn trace_settings(mut self, sources: Sources) -> Self {
        self.trace_settings = Some(sources);
        self
    }

    /// Checks what was given. Talks to nobody.
    ///
    /// ```
    /// # use tasker_worker::{Error, Worker};
    /// let empty = Worker::builder("postgresql:///shop").build();
    /// assert!(matches!(empty, Err(Error::NoHandlers)));
    /// ```
    ///
    /// # Errors
    /// The field that cannot be used: [`Error::Name`] for the namespace or a queue, [`Error::Slots`],
    /// [`Error::DuplicateHandler`], [`Error::NoHandlers`], [`Error::Handler`] for a handler's name, or
    /// [`Error::Label`] for the worker's name or version.
    pub fn build(mut self) -> Result<Worker, Error> {
        check_name("namespace", &self.namespace)?;
        for queue in self.queues.iter().flatten() {
            check_name("queue", queue)?;
        }
        if self.queues.is_empty() {
            self.queues.push(None);
        }
        if !(1..=100_000).contains(&self.slots) {
            return Err(Error::Slots);
        }
        if self.builtins {
            self.registry.insert("noop".into(), Typed::new(handlers::noop));
            self.registry.insert("echo".into(), Typed::new(handlers::echo));
            self.registry.insert("sleep".into(), Typed::new(handlers::sleep));
            self.registry.insert("fail".into(), Typed::new(handlers::fail));
            let http = Http::new(self.http_hosts);
            self.registry.insert("http".into(), Typed::new(move |ctx, request| http.clone().call(ctx, request)));
        }
        if let Some(name) = self.registry.duplicate {
            return Err(Error::DuplicateHandler(name));
        }
        if self.registry.names().is_empty() {
            return Err(Error::NoHandlers);
        }
        if let Some(name) = self.registry.names().into_iter().find(|name| !is_handler(name)) {
            return Err(Error::Handler(name));
        }
        let name = self.name.unwrap_or_else(default_name);
        for (what, text, shortest) in [("name", &name, 1), ("version", &self.version, 0)] {
            if !(shortest..=200).contains(&text.len()) || text.chars().any(char::is_control) {
                return Err(Error::Label(what, shortest));
            }
        }
        Ok(Worker {
            url: self.url,
            namespace: self.namespace,
            queues: self.queues,
            registry: self.registry,
            slots: self.slots,
            drain_timeout: self.drain_timeout,
            cancel_grace: self.cancel_grace,
            name,
            version: self.version,
            #[cfg(feature = "metrics")]
            metrics: self.metrics,
            capture: self.capture,
            #[cfg(feature = "otlp")]
            trace_settings: self.trace_settings,
        })
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    let words = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.split('_').all(|word| !word.is_empty() && word.chars().all(words));
    if good { Ok(()) } else { Err(Error::Name { what, name: name.to_owned() }) }
}

/// As templates have it: another would never be asked for.
fn is_handler(name: &str) -> bool {
    let words = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    name.len() <= 100
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.split('.').all(|part| !part.is_empty() && part.chars().all(words))
}

fn default_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}-{}-{:04x}", std::process::id(), rand::random::<u16>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_could_never_work_is_not_built() {
        let build =
            |change: fn(Builder) -> Builder| change(Worker::builder("postgresql:///x").builtins()).build().map(drop);
        assert!(build(|b| b).is_ok());
        assert!(matches!(build(|b| b.namespace("a__b")), Err(Error::Name { what: "namespace", .. })));
        assert!(matches!(build(|b| b.namespace("")), Err(Error::Name { .. })));
        assert!(matches!(build(|b| b.queue(Some("Slow"))), Err(Error::Name { what: "queue", .. })));
        assert!(matches!(build(|b| b.queue(Some("slow_"))), Err(Error::Name { .. })));
        assert!(matches!(build(|b| b.slots(0)), Err(Error::Slots)));
        assert!(build(|b| b.handler("orders.ship_2.1st", handlers::echo).version("")).is_ok());
        for name in ["", "Ship", "a\0b", "a..b", "1st", "a b"] {
            let answer = Worker::builder("postgresql:///x").handler(name, handlers::echo).build();
            assert!(matches!(answer, Err(Error::Handler(refused)) if refused == name), "{name:?}");
        }
        assert!(matches!(build(|b| b.name("a\0b")), Err(Error::Label("name", 1))));
        assert!(matches!(build(|b| b.name("")), Err(Error::Label("name", 1))));
        assert!(matches!(build(|b| b.version("v".repeat(201))), Err(Error::Label("version", 0))));
        assert!(
            matches!(build(|b| b.handler("echo", handlers::echo)), Err(Error::DuplicateHandler(name)) if name == "echo")
        );
        assert!(matches!(Worker::builder("postgresql:///x").build(), Err(Error::NoHandlers)));
    }

    #[test]
    fn two_workers_of_one_process_have_different_names() {
        let name = default_name();
        assert!(name.contains(&format!("-{}-", std::process::id())), "{name}");
        assert!((0..8).any(|_| default_name() != name));
    }
}
