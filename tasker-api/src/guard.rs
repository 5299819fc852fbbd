//! What every request passes: which host it was sent to, who sends it and from where, how often.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State as Extract};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::FutureExt as _;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use sqlx::PgPool;
use subtle::ConstantTimeEq as _;
use tasker_shared::store::outage::Outage;
use tasker_shared::store::tx;

use crate::auth::keys;
use crate::auth::{self, Principal, cookie_of, csrf_of, sha256};
use crate::problem::{Away, CROSS_SITE, INTERNAL, Problem, RATE_LIMITED, TIMEOUT, UNAUTHENTICATED, UNKNOWN_HOST};
use crate::{Config, State};

/// How long an answer of the database about a credential is believed: a revoked key is refused
/// no later.
const BELIEVE: Duration = Duration::from_millis(850);
/// A credential that was used so lately is asked for together with others.
const IN_USE: Duration = Duration::from_secs(10);
/// Credentials that are remembered at once; more are asked for again.
const MOST_KNOWN: usize = 10_000;
/// An address that failed to sign in too often may try again this often, in seconds.
const FAILED_AGAIN_S: u32 = 5;
/// Cookies a second that the database is asked about for one address.
const COOKIES_PER_S: f64 = 10.0;
/// The longest that a request may take until its answer begins, its body included.
const LONGEST_REQUEST: Duration = Duration::from_secs(30);

/// Where the token that proves a write to come from a page of ours has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsrfIn {
    /// It reads only.
    NotNeeded,
    /// In the header `x-tasker-csrf`.
    Header,
    /// In a field of a form: the handler calls [`Caller::check_csrf`].
    Form,
}

/// A principal that has been let in.
#[derive(Debug, Clone)]
pub struct Caller {
    principal: Arc<Principal>,
    /// What it came with: what watches goes on only while that is valid.
    credential: Arc<Credential>,
    /// What a page of this session sends with a write; `None` for a key.
    csrf: Option<String>,
}

impl Deref for Caller {
    type Target = Principal;

    fn deref(&self) -> &Principal {
        &self.principal
    }
}

impl Caller {
    /// What a page of this session sends with each write; `None` if it came with a key.
    pub fn csrf(&self) -> Option<&str> {
        self.csrf.as_deref()
    }

    /// Refuses a write of a browser without this session's token.
    pub fn check_csrf(&self, sent: &str) -> Result<(), Problem> {
        match &self.csrf {
            Some(own) if !bool::from(own.as_bytes().ct_eq(sent.as_bytes())) => Err(CROSS_SITE
                .because("the request lacks this session's token; load the page again")
                .field("x-tasker-csrf")),
            _ => Ok(()),
        }
    }

    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }
}

/// Lets pages ask who is there: reads need no token, writes need it in the header.
impl FromRequestParts<State> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Problem> {
        let csrf = if parts.method.is_safe() { CsrfIn::NotNeeded } else { CsrfIn::Header };
        identify(state, parts, csrf).await
    }
}

/// Who sends this: `Authorization: Bearer`, else the session's cookie. Counts it against the
/// principal's rate.
pub async fn identify(state: &State, parts: &Parts, csrf: CsrfIn) -> Result<Caller, Problem> {
    let headers = &parts.headers;
    let caller = if let Some(value) = headers.get(header::AUTHORIZATION) {
        let key = value.to_str().ok().and_then(|text| {
            let (scheme, key) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        });
        let key = key.ok_or_else(|| UNAUTHENTICATED.because("authorization: must be `Bearer tsk_…`"))?;
        let refused = || UNAUTHENTICATED.because("the key is unknown, expired or revoked");
        let Some(credential) = Credential::key(key).map(Arc::new) else {
            let source = source(state.config(), parts);
            may_try(state, source)?;
            failed(state, source);
            return Err(refused());
        };
        let principal = whose(state, parts, &credential).await?.ok_or_else(refused)?;
        Caller { principal, credential, csrf: None }
    } else if let Some(cookie) = cookie_of(headers) {
        let credential = Arc::new(Credential::session(cookie));
        let principal = whose(state, parts, &credential).await?;
        let principal = principal.ok_or_else(|| UNAUTHENTICATED.because("the session has ended; sign in again"))?;
        let caller = Caller { principal, credential, csrf: Some(csrf_of(cookie)) };
        if csrf != CsrfIn::NotNeeded {
            same_site(headers)?;
        }
        if csrf == CsrfIn::Header {
            caller.check_csrf(text(headers, &HeaderName::from_static("x-tasker-csrf")))?;
        }
        caller
    } else {
        return Err(UNAUTHENTICATED.because("send `Authorization: Bearer <key>`, or sign in at /login"));
    };
    let Config { rate_per_s, burst, .. } = state.config();
    if !state.rates().take(caller.key_id.clone(), f64::from(*rate_per_s), *burst) {
        let detail = format!("this key may send {rate_per_s} requests a second; wait a moment");
        return Err(RATE_LIMITED.because(detail).retry_after(1));
    }
    Ok(caller)
}

/// Whose the credential is. Those that are new here are counted for the address that they come
/// from; who was let in a moment ago is not locked out by others at the same address.
async fn whose(state: &State, parts: &Parts, credential: &Arc<Credential>) -> Result<Option<Arc<Principal>>, Problem> {
    let is_new = !state.known().has(credential);
    let source = source(state.config(), parts);
    if is_new {
        match **credential {
            Credential::Key(..) => may_try(state, source)?,
            Credential::Session(_) => may_look_up(state, source)?,
        }
    }
    let found = state.known().check(state.pool(), std::slice::from_ref(credential)).await?.pop().flatten();
    if is_new && found.is_none() && matches!(**credential, Credential::Key(..)) {
        failed(state, source);
    }
    Ok(found)
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> &'h str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Refuses a browser's request from a page of another origin.
pub(crate) fn same_site(headers: &HeaderMap) -> Result<(), Problem> {
    let site = text(headers, &HeaderName::from_static("sec-fetch-site"));
    if !matches!(site, "" | "same-origin" | "none") {
        return Err(CROSS_SITE.because("the request comes from a page of another site"));
    }
    let origin = headers.get(header::ORIGIN).map(|value| value.to_str().unwrap_or("null"));
    let host = text(headers, &header::HOST);
    match origin {
        Some(origin) if origin.split_once("://").is_none_or(|(_, named)| named != host) => {
            Err(CROSS_SITE.because("origin: is not this site").field("origin"))
        }
        _ => Ok(()),
    }
}

/// What somebody came with, as it is kept here: never the secret itself.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) enum Credential {
    /// The hash of a browser's cookie.
    Session([u8; 32]),
    /// The id of a key, and the hash of its secret.
    Key(String, [u8; 32]),
}

impl Credential {
    fn session(cookie: &str) -> Self {
        Self::Session(sha256(cookie))
    }

    /// `None`: it has not the shape of a key.
    fn key(key: &str) -> Option<Self> {
        auth::parts(key).map(|(id, secret)| Self::Key(id.to_owned(), sha256(secret)))
    }
}

/// What the database said about credentials a moment ago. Whoever finds an answer too old asks for
/// all credentials that are in use, so that any number of them costs one statement at a time.
#[derive(Debug, Default)]
pub(crate) struct Known {
    seen: Mutex<HashMap<Arc<Credential>, KnownPrincipal>>,
    /// Who wants to know, and where the answer goes.
    wanted: Mutex<HashMap<Arc<Credential>, Arc<Verdict>>>,
    /// One asks, the others wait for the same answer.
    turn: tokio::sync::Mutex<()>,
}

/// What was found out: whose the credential is, if it is valid.
type Verdict = OnceLock<Result<Option<Arc<Principal>>, Problem>>;

#[derive(Debug)]
struct KnownPrincipal {
    /// From before the question: the answer was true then.
    asked: Instant,
    used: Instant,
    principal: Arc<Principal>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Known {
    /// Whether this was good a moment ago.
    fn has(&self, credential: &Arc<Credential>) -> bool {
        locked(&self.seen).contains_key(credential)
    }

    /// Whose each of these is, if it is valid, by an answer that is no older than [`BELIEVE`].
    pub(crate) async fn check(
        &self,
        pool: &PgPool,
        credentials: &[Arc<Credential>],
    ) -> Result<Vec<Option<Arc<Principal>>>, Problem> {
        let mut verdicts = self.known_or_wanted(credentials);
        if verdicts.iter().any(|verdict| verdict.get().is_none()) {
            let _turn = self.turn.lock().await;
            for (credential, verdict) in credentials.iter().zip(&mut verdicts) {
                // Whoever had the turn before may have asked for this, or gone away with it.
                if verdict.get().is_none() {
                    *verdict = self.known_or_wanted(std::slice::from_ref(credential)).remove(0);
                }
            }
            if verdicts.iter().any(|verdict| verdict.get().is_none()) {
                self.ask(pool).await?;
            }
        }
        verdicts.iter().map(|verdict| verdict.get().cloned().unwrap_or(Ok(None))).collect()
    }

    /// Answers that are fresh, and places for those that are not.
    fn known_or_wanted(&self, credentials: &[Arc<Credential>]) -> Vec<Arc<Verdict>> {
        let now = Instant::now();
        let mut seen = locked(&self.seen);
        let mut wanted = locked(&self.wanted);
        credentials
            .iter()
            .map(|credential| {
                if let Some(known) = seen.get_mut(credential) {
                    known.used = now;
                    if now.duration_since(known.asked) < BELIEVE {
                        return Arc::new(OnceLock::from(Ok(Some(Arc::clone(&known.principal)))));
                    }
                }
                Arc::clone(wanted.entry(Arc::clone(credential)).or_default())
            })
            .collect()
    }

    /// Asks for what is wanted, and for what is in use and will be wanted next.
    async fn ask(&self, pool: &PgPool) -> Result<(), Problem> {
        let asked = Instant::now();
        let wanted = std::mem::take(&mut *locked(&self.wanted));
        let mut credentials: HashSet<Arc<Credential>> = wanted.keys().cloned().collect();
        let mut in_use = locked(&self.seen)
            .iter()
            .filter(|(_, seen)| asked.duration_since(seen.used) < IN_USE)
            .map(|(credential, _)| Arc::clone(credential))
            .collect::<Vec<_>>();
        in_use.truncate(MOST_KNOWN);
        credentials.extend(in_use);
        let (mut sessions, mut keys) = (Vec::new(), Vec::new());
        for credential in &credentials {
            match &**credential {
                Credential::Session(hash) => sessions.push(hash.to_vec()),
                Credential::Key(id, _) => keys.push(id.clone()),
            }
        }
        let rows = || async { keys::valid_now(&mut *pool.acquire().await?, &sessions, &keys).await };
        let rows = match rows().await {
            // Whoever waits for this may send what cannot be sent twice.
            Err(error) if tx::was_lost(pool, &error) => rows().await,
            rows => rows,
        };
        let rows = match rows {
            Ok(rows) => {
                Outage::of(pool).answered();
                rows
            }
            Err(error) => {
                // Who waits for the same answer does not ask in vain once more.
                let problem = Problem::from(error);
                for place in wanted.values() {
                    let _ = place.set(Err(problem.clone()));
                }
                return Err(problem);
            }
        };
        let mut of_session: HashMap<Vec<u8>, Arc<Principal>> = HashMap::new();
        let mut of_key: HashMap<String, (Vec<u8>, Arc<Principal>)> = HashMap::new();
        for (session, key) in rows {
            let (id, secret_hash) = (key.key_id.clone(), key.secret_hash.clone());
            let principal = Arc::new(Principal::of(key));
            match session {
                Some(hash) => _ = of_session.insert(hash, principal),
                None => _ = of_key.insert(id, (secret_hash, principal)),
            }
        }
        let verdict = |credential: &Credential| match credential {
            Credential::Session(hash) => of_session.get(hash.as_slice()).cloned(),
            Credential::Key(id, secret) => {
                let (hash, principal) = of_key.get(id)?;
                bool::from(hash.as_slice().ct_eq(secret)).then(|| Arc::clone(principal))
            }
        };
        let mut seen = locked(&self.seen);
        seen.retain(|_, seen| asked.duration_since(seen.used) < IN_USE);
        for credential in credentials {
            match verdict(&credential) {
                None => _ = seen.remove(&credential),
                Some(principal) => {
                    if let Some(known) = seen.get_mut(&credential) {
                        (known.asked, known.principal) = (asked, principal);
                    } else if seen.len() < MOST_KNOWN {
                        seen.insert(credential, KnownPrincipal { asked, used: asked, principal });
                    }
                }
            }
        }
        drop(seen);
        for (credential, place) in wanted {
            // Set once: nobody else has it.
            let _ = place.set(Ok(verdict(&credential)));
        }
        Ok(())
    }
}

/// A bucket for each of something: what it holds at most may be taken at once, and it fills again.
#[derive(Debug)]
pub(crate) struct Buckets<K>(Mutex<HashMap<K, (f64, Instant)>>);

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Buckets<K> {
    /// Takes one; false if there is none.
    fn take(&self, key: K, per_s: f64, most: u32) -> bool {
        self.look(key, per_s, most, 1.0)
    }

    /// Whether one could be taken.
    fn has(&self, key: K, per_s: f64, most: u32) -> bool {
        self.look(key, per_s, most, 0.0)
    }

    fn look(&self, key: K, per_s: f64, most: u32, take: f64) -> bool {
        let most = f64::from(most.max(1));
        let mut buckets = locked(&self.0);
        let now = Instant::now();
        if buckets.len() > MOST_KNOWN {
            buckets.retain(|_, (_, at)| now.duration_since(*at).as_secs_f64() * per_s < most);
        }
        let (tokens, at) = buckets.entry(key).or_insert((most, now));
        *tokens = (*tokens + now.duration_since(*at).as_secs_f64() * per_s).min(most);
        *at = now;
        let enough = *tokens >= 1.0;
        if enough {
            *tokens -= take;
        }
        enough
    }
}

/// The address at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Where a request comes from, as far as it matters for counting: of an IPv6 address its network,
/// of which one machine has all. Behind a proxy that ends TLS, what that proxy saw.
pub(crate) fn source(config: &Config, parts: &Parts) -> IpAddr {
    let peer = parts.extensions.get::<Peer>().map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.0);
    let forwarded = || {
        // Each proxy adds what it saw at the end; what stands before it anybody may have written.
        let last = parts.headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
        last.rsplit(',').next()?.trim().parse().ok()
    };
    network(if config.behind_tls_proxy { forwarded().unwrap_or(peer) } else { peer })
}

/// An address as far as it matters for counting.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => IpAddr::V4(ip),
            None => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        },
        ip @ IpAddr::V4(_) => ip,
    }
}

/// Refuses an address that has failed to sign in too often.
pub(crate) fn may_try(state: &State, source: IpAddr) -> Result<(), Problem> {
    if state.failures().has((source, Kind::SignIn), 1.0 / f64::from(FAILED_AGAIN_S), state.config().failed_sign_ins) {
        return Ok(());
    }
    Err(RATE_LIMITED
        .because(format!("too many failed sign-ins from this address; try again in {FAILED_AGAIN_S} s"))
        .retry_after(FAILED_AGAIN_S.into()))
}

/// Counts a failed sign-in.
pub(crate) fn failed(state: &State, source: IpAddr) {
    state.failures().take((source, Kind::SignIn), 1.0 / f64::from(FAILED_AGAIN_S), state.config().failed_sign_ins);
}

/// Counts a cookie that was not seen lately. An old page that is still open shows one that has
/// ended again and again, and must not keep its user from signing in: these are counted apart, and
/// only so that nobody can keep the database busy with them.
fn may_look_up(state: &State, source: IpAddr) -> Result<(), Problem> {
    let most = state.config().failed_sign_ins.saturating_mul(10);
    if state.failures().take((source, Kind::Cookie), COOKIES_PER_S, most) {
        return Ok(());
    }
    Err(RATE_LIMITED.because("too many unknown sessions from this address; wait a moment").retry_after(1))
}

/// What is counted of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Keys and links that are not valid.
    SignIn,
    /// Cookies that the database was asked about.
    Cookie,
}

/// Around every route: the host is one of ours, the handler neither hangs nor panics the
/// connection, and the browser is told what it may do with the answer.
pub(crate) async fn around(Extract(state): Extract<State>, request: Request, next: Next) -> Response {
    let secure = state.config().is_secure();
    let mut response = if let Err(refused) = host_is_ours(state.config(), &request) {
        refused.into_response()
    } else {
        let answer = std::panic::AssertUnwindSafe(next.run(request)).catch_unwind();
        match tokio::time::timeout(LONGEST_REQUEST, answer).await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                tracing::error!("a handler of the API panicked");
                INTERNAL.because("the server made a mistake; its log says more").into_response()
            }
            Err(_) => TIMEOUT.because(format!("no answer within {} s", LONGEST_REQUEST.as_secs())).into_response(),
        }
    };
    let headers = response.headers_mut();
    for (name, value) in SECURITY_HEADERS {
        headers.entry(HeaderName::from_static(name)).or_insert(HeaderValue::from_static(value));
    }
    if secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    response
}

/// Around every route that asks the database: a read that met a connection that had died is asked
/// once more, before anything is answered, and an outage is logged once and not with every request.
pub(crate) async fn once_more(Extract(state): Extract<State>, request: Request, next: Next) -> Response {
    let again = request.method().is_safe().then(|| {
        let mut again = Request::new(Body::empty());
        *again.method_mut() = request.method().clone();
        *again.uri_mut() = request.uri().clone();
        *again.headers_mut() = request.headers().clone();
        *again.extensions_mut() = request.extensions().clone();
        (again, next.clone())
    });
    let response = next.run(request).await;
    let Some(away) = response.extensions().get::<Away>() else { return response };
    state.outage().failed(&*away.error);
    match again {
        Some((again, next)) if away.is_lost => next.run(again).await,
        _ => response,
    }
}

const SECURITY_HEADERS: [(&str, &str); 6] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; \
         connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    // Not `no-referrer`: a browser would send `Origin: null` with the forms of our own pages.
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
];

/// A page of another site that has pointed its own name at this machine is not let in.
fn host_is_ours(config: &Config, request: &Request) -> Result<(), Problem> {
    // Probes ask by address, and learn nothing but that the server lives.
    if request.uri().path().starts_with("/health/") {
        return Ok(());
    }
    let named = request.uri().authority().map(http::uri::Authority::as_str);
    let host = named.unwrap_or_else(|| text(request.headers(), &header::HOST));
    if config.answers_to(host) {
        return Ok(());
    }
    Err(UNKNOWN_HOST
        .because("host: this server was not told to answer to that name; start it with --allow-host NAME")
        .field("host"))
}
