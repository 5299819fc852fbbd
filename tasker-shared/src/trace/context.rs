//! W3C trace context and baggage: parse, write, carry.
//!
//! Malformed context is dropped and reported to the caller for counting; it is
//! never an error, and never leaves this file in a form another system could
//! choke on. The OpenTelemetry context appears only in the last section.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{PoisonError, RwLock};

use opentelemetry::baggage::BaggageExt;
use opentelemetry::trace::{SpanContext, TraceContextExt, TraceFlags, TraceState};
use opentelemetry::{Context, KeyValue};

use super::otlp::hex;
use super::span::{SpanId, TraceId};

/// Longest `tracestate` that is passed on, in bytes; a longer one is dropped.
pub const MAX_TRACESTATE_BYTES: usize = 512;
/// Most members of a `tracestate` (W3C).
const MAX_TRACESTATE_MEMBERS: usize = 32;
/// Most members of a `baggage` (W3C).
pub const MAX_BAGGAGE_MEMBERS: usize = 64;
/// Longest `baggage`, in bytes (W3C).
pub const MAX_BAGGAGE_BYTES: usize = 8192;

/// The keys of baggage that are passed on unless configured otherwise.
pub const DEFAULT_BAGGAGE_KEYS: [&str; 3] = ["correlation_id", "task_uuid", "namespace"];

pub(crate) const TRACEPARENT: &str = "traceparent";
pub(crate) const TRACESTATE: &str = "tracestate";
pub(crate) const BAGGAGE: &str = "baggage";

/// A valid W3C `traceparent`. `Display` writes it in version 00.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Traceparent {
    /// Never all zero.
    pub trace_id: TraceId,
    /// Never all zero.
    pub span_id: SpanId,
    /// Bit 0 is "sampled"; the other bits are dropped when parsing.
    pub flags: u8,
}

/// Why a `traceparent` was ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TraceparentError {
    /// Not `version-trace_id-span_id-flags` with lower-case hex of the right lengths.
    #[error("traceparent is not 00-<32 lower-case hex digits>-<16>-<2>")]
    Shape,
    /// Version `ff` is forbidden.
    #[error("traceparent has the forbidden version ff")]
    Version,
    /// A trace id or a span id of zeros means "none".
    #[error("traceparent has an id of zeros only")]
    ZeroId,
}

impl Traceparent {
    /// Whether the caller recorded its trace.
    pub fn sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

impl FromStr for Traceparent {
    type Err = TraceparentError;

    fn from_str(text: &str) -> Result<Self, TraceparentError> {
        let bytes = text.trim_matches([' ', '\t']).as_bytes();
        // A later version may append fields after another dash; 00 may not.
        let (fixed, rest) = bytes.split_at_checked(55).ok_or(TraceparentError::Shape)?;
        if fixed[2] != b'-' || fixed[35] != b'-' || fixed[52] != b'-' {
            return Err(TraceparentError::Shape);
        }
        let [version] = unhex(&fixed[..2])?;
        let trace_id: TraceId = unhex(&fixed[3..35])?;
        let span_id: SpanId = unhex(&fixed[36..52])?;
        let [flags] = unhex(&fixed[53..])?;
        match (version, rest) {
            (0xff, _) => return Err(TraceparentError::Version),
            (_, []) | (1.., [b'-', ..]) => {}
            _ => return Err(TraceparentError::Shape),
        }
        if trace_id == [0; 16] || span_id == [0; 8] {
            return Err(TraceparentError::ZeroId);
        }
        Ok(Self { trace_id, span_id, flags: flags & 1 })
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", hex(&self.trace_id), hex(&self.span_id), self.flags)
    }
}

fn unhex<const N: usize>(digits: &[u8]) -> Result<[u8; N], TraceparentError> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Ok(b - b'0'),
        b'a'..=b'f' => Ok(b - b'a' + 10),
        _ => Err(TraceparentError::Shape),
    };
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(out)
}

/// The `tracestate` to pass on: the given one, or `None` when it is empty, too
/// long or not a list of `key=value`.
pub fn tracestate(text: &str) -> Option<&str> {
    let text = text.trim_matches([' ', '\t']);
    let printable = text.bytes().all(|b| (0x20..0x7f).contains(&b) || b == b'\t');
    if text.is_empty() || text.len() > MAX_TRACESTATE_BYTES || !printable {
        return None;
    }
    let mut members = text.split(',').map(str::trim).filter(|m| !m.is_empty());
    let valid = members.by_ref().take(MAX_TRACESTATE_MEMBERS).all(|member| {
        member.split_once('=').is_some_and(|(key, value)| !key.is_empty() && !value.is_empty() && !value.contains('='))
    });
    (valid && members.next().is_none()).then_some(text)
}

/// W3C baggage: key and value pairs in their order, percent-decoded.
/// Properties of members are dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage(Vec<(String, String)>);

impl Baggage {
    /// Reads a `baggage` header. Also returns whether anything was dropped:
    /// malformed members, repeated keys, or what exceeds
    /// [`MAX_BAGGAGE_MEMBERS`] and [`MAX_BAGGAGE_BYTES`].
    pub fn parse(text: &str) -> (Self, bool) {
        let (mut baggage, mut used, mut dropped) = (Self::default(), 0, false);
        for member in text.split(',') {
            if member.trim().is_empty() {
                continue;
            }
            used += member.len() + 1;
            if used > MAX_BAGGAGE_BYTES + 1 {
                return (baggage, true);
            }
            let pair = member.split(';').next().unwrap_or_default();
            let accepted = pair.split_once('=').is_some_and(|(key, value)| {
                let value = value.trim();
                value.bytes().all(is_baggage_octet)
                    && percent_decode(value).is_some_and(|value| baggage.insert(key.trim(), &value))
            });
            dropped |= !accepted;
        }
        (baggage, dropped)
    }

    /// Appends a member and returns whether it was taken: not when the key is
    /// no W3C token or is there already, or the baggage is full.
    pub fn insert(&mut self, key: &str, value: &str) -> bool {
        let fits = self.0.len() < MAX_BAGGAGE_MEMBERS && is_token(key) && self.get(key).is_none();
        if fits {
            self.0.push((key.to_owned(), value.to_owned()));
        }
        fits
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The members, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// True without members.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drops every member whose key is not in `keys`.
    pub fn allow(&mut self, keys: &[impl AsRef<str>]) {
        self.0.retain(|(key, _)| keys.iter().any(|k| k.as_ref() == key));
    }
}

/// The header value. Members that would exceed [`MAX_BAGGAGE_BYTES`] are left
/// out, so what we send is always accepted.
impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut used = 0;
        for (key, value) in &self.0 {
            let value = percent_encode(value);
            let len = key.len() + 1 + value.len() + usize::from(used > 0);
            if used + len > MAX_BAGGAGE_BYTES {
                continue;
            }
            write!(f, "{}{key}={value}", if used > 0 { "," } else { "" })?;
            used += len;
        }
        Ok(())
    }
}

/// RFC 7230 `token`, the grammar of a baggage key.
fn is_token(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// `baggage-octet`: printable ASCII but space, quote, comma, semicolon, backslash.
fn is_baggage_octet(b: u8) -> bool {
    b.is_ascii_graphic() && !b"\",;\\".contains(&b)
}

fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if is_baggage_octet(b) && b != b'%' {
            out.push(char::from(b));
        } else {
            out.push('%');
            out.push_str(&hex(&[b]).to_ascii_uppercase());
        }
    }
    out
}

/// `None` when the result is not UTF-8. A lone `%` stands for itself.
pub(super) fn percent_decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [a, b, ..]) => char::from(*a).to_digit(16).zip(char::from(*b).to_digit(16)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            out.push(u8::try_from(high << 4 | low).ok()?);
            rest = &tail[2..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(out).ok()
}

/// What a message, a request or an SQL call brought along.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Incoming {
    /// The caller's span, if it sent a valid one.
    pub traceparent: Option<Traceparent>,
    /// Only beside a `traceparent`.
    pub tracestate: Option<String>,
    /// Not yet filtered by an allow-list.
    pub baggage: Baggage,
    /// Something was there and was ignored or cut: count it.
    pub malformed: bool,
}

impl Incoming {
    /// Reads the three header values, each of which may be absent.
    pub fn parse(traceparent: Option<&str>, state: Option<&str>, baggage: Option<&str>) -> Self {
        let parsed = traceparent.map(str::parse::<Traceparent>);
        let parent = parsed.and_then(Result::ok);
        let kept_state = state.filter(|_| parent.is_some()).and_then(tracestate);
        let (baggage, baggage_cut) = baggage.map(Baggage::parse).unwrap_or_default();
        let state_cut = parent.is_some() && kept_state.is_none() && state.is_some_and(|s| !s.trim().is_empty());
        Self {
            traceparent: parent,
            tracestate: kept_state.map(str::to_owned),
            baggage,
            malformed: parsed.is_some_and(|p| p.is_err()) || state_cut || baggage_cut,
        }
    }
}

/// Which formats are read and written (`OTEL_PROPAGATORS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagators {
    /// `tracecontext`: `traceparent` and `tracestate`.
    pub trace_context: bool,
    /// `baggage`.
    pub baggage: bool,
}

impl Default for Propagators {
    fn default() -> Self {
        Self { trace_context: true, baggage: true }
    }
}

/// Bit 0: no trace context. Bit 1: no baggage.
static SWITCHED_OFF: AtomicU8 = AtomicU8::new(0);

impl Propagators {
    /// Makes these the ones of [`inject_current`] and [`extract`], for the
    /// whole process, from now on.
    pub fn activate(self) {
        let off = u8::from(!self.trace_context) | u8::from(!self.baggage) << 1;
        SWITCHED_OFF.store(off, Ordering::Relaxed);
    }

    fn active() -> Self {
        let off = SWITCHED_OFF.load(Ordering::Relaxed);
        Self { trace_context: off & 1 == 0, baggage: off & 2 == 0 }
    }
}

static ALLOWED: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Makes these the keys of a caller's baggage that go on to steps; ours always do.
pub fn allow_baggage(keys: &[String]) {
    keys.clone_into(&mut ALLOWED.write().unwrap_or_else(PoisonError::into_inner));
}

/// What a caller's baggage may pass on, added to `own`.
pub fn pass_on(own: &mut Baggage, callers: &str) {
    let (mut theirs, _) = Baggage::parse(callers);
    theirs.allow(&ALLOWED.read().unwrap_or_else(PoisonError::into_inner));
    for (key, value) in theirs.iter() {
        own.insert(key, value);
    }
}

/// Writes `traceparent`, `tracestate` and `baggage` of the current
/// OpenTelemetry context into `headers`; absent or empty ones are not written.
///
/// In handler code this is what makes an outgoing request or a nested task
/// part of the trace.
pub fn inject_current<S: std::hash::BuildHasher>(headers: &mut HashMap<String, String, S>) {
    let active = Propagators::active();
    Context::map_current(|cx| {
        let span = cx.span();
        let span = span.span_context();
        if active.trace_context && span.is_valid() {
            let parent = Traceparent {
                trace_id: span.trace_id().to_bytes(),
                span_id: span.span_id().to_bytes(),
                flags: span.trace_flags().to_u8() & 1,
            };
            headers.insert(TRACEPARENT.into(), parent.to_string());
            if let Some(state) = tracestate(&span.trace_state().header()) {
                headers.insert(TRACESTATE.into(), state.to_owned());
            }
        }
        let mut members: Vec<_> = cx.baggage().iter().map(|(k, (v, _))| (k.as_str(), v.as_str())).collect();
        // The SDK keeps baggage in a hash map; equal baggage should give equal headers.
        members.sort_unstable();
        let mut baggage = Baggage::default();
        for (key, value) in members {
            baggage.insert(key, value);
        }
        if active.baggage && !baggage.is_empty() {
            headers.insert(BAGGAGE.into(), baggage.to_string());
        }
    });
}

/// Reads the three headers, whatever the case of their names.
pub fn extract<S: std::hash::BuildHasher>(headers: &HashMap<String, String, S>) -> Incoming {
    let active = Propagators::active();
    let get = |name: &str| {
        let exact = headers.get(name);
        let any_case = || headers.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v);
        exact.or_else(any_case).map(String::as_str)
    };
    Incoming::parse(
        get(TRACEPARENT).filter(|_| active.trace_context),
        get(TRACESTATE).filter(|_| active.trace_context),
        get(BAGGAGE).filter(|_| active.baggage),
    )
}

/// The context in which code below a span of the tree runs: the span as a
/// remote parent, and the baggage. Wrap a handler's future with it:
/// `future.with_context(cx)` of `opentelemetry::context::FutureExt`.
pub fn to_otel_context(parent: &Traceparent, state: Option<&str>, baggage: &Baggage) -> Context {
    let state = state.and_then(|s| TraceState::from_str(s).ok()).unwrap_or_default();
    let span = SpanContext::new(
        opentelemetry::TraceId::from_bytes(parent.trace_id),
        opentelemetry::SpanId::from_bytes(parent.span_id),
        TraceFlags::new(parent.flags),
        true,
        state,
    );
    // From an empty context: what happens to be current is none of the handler's business.
    let cx = Context::new().with_remote_span_context(span);
    if baggage.is_empty() {
        return cx;
    }
    cx.with_baggage(baggage.iter().map(|(k, v)| KeyValue::new(k.to_owned(), v.to_owned())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn traceparents_are_accepted_or_refused_as_w3c_says() {
        use TraceparentError::{Shape, Version, ZeroId};
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        let refused = |text: &str, why| assert_eq!(text.parse::<Traceparent>(), Err(why), "{text}");
        let flags = |text: &str| text.parse::<Traceparent>().unwrap_or_else(|e| panic!("{text}: {e}")).flags;
        assert_eq!(flags(VALID), 1);
        assert_eq!(flags(&format!("00-{ids}-00")), 0);
        assert_eq!(flags(&format!("00-{ids}-03")), 1);
        assert_eq!(flags(&format!("00-{ids}-fe")), 0);
        assert_eq!(flags(&format!(" \t00-{ids}-01 ")), 1);
        assert_eq!(flags(&format!("cc-{ids}-01")), 1);
        assert_eq!(flags(&format!("cc-{ids}-01-what-the-future-holds")), 1);
        refused("", Shape);
        refused("garbage", Shape);
        refused(&"é".repeat(28), Shape);
        refused(&VALID.to_uppercase(), Shape);
        refused(&VALID.replace('b', "B"), Shape);
        refused(&VALID.replace('-', "_"), Shape);
        refused(&format!("00-{ids}-0"), Shape);
        refused(&format!("00-{ids}-0g"), Shape);
        refused(&format!("00-{ids}-01-more"), Shape);
        refused(&format!("cc-{ids}-01more"), Shape);
        refused(&format!("0-{ids}-01"), Shape);
        refused(&format!("ff-{ids}-01"), Version);
        refused("00-00000000000000000000000000000000-00f067aa0ba902b7-01", ZeroId);
        refused("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ZeroId);
    }

    #[test]
    fn tracestate_is_passed_on_or_dropped_whole() {
        assert_eq!(tracestate("a=1,b@c=x y"), Some("a=1,b@c=x y"));
        assert_eq!(tracestate(" a=1 "), Some("a=1"));
        let longest = format!("a={}", "x".repeat(510));
        assert_eq!(tracestate(&longest), Some(longest.as_str()));
        let too_many = (0..33).map(|i| format!("k{i}=v")).collect::<Vec<_>>().join(",");
        for bad in ["", " ", "a", "=1", "a=", "a=b=c", "a=1\n", "ä=1", &format!("{longest}x"), &too_many] {
            assert_eq!(tracestate(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn baggage_is_read_without_its_bad_members() {
        let read = |text: &str| {
            let (baggage, dropped) = Baggage::parse(text);
            (baggage.to_string(), dropped)
        };
        assert_eq!(read("a=1, b = 2 ;p=q;r"), ("a=1,b=2".into(), false));
        assert_eq!(read(""), (String::new(), false));
        assert_eq!(read("a=%C3%A4%20x,b=100%"), ("a=%C3%A4%20x,b=100%25".into(), false));
        assert_eq!(read("a=1,nonsense,b=2"), ("a=1,b=2".into(), true));
        assert_eq!(read("a=1,a=2"), ("a=1".into(), true));
        assert_eq!(read("a=%FF,b=2"), ("b=2".into(), true));
        assert_eq!(read("bad key=1,b=\"x\",c=3"), ("c=3".into(), true));
    }

    #[test]
    fn baggage_keeps_to_the_limits_in_both_directions() {
        let many = (0..65).map(|i| format!("k{i}=v")).collect::<Vec<_>>().join(",");
        let (baggage, dropped) = Baggage::parse(&many);
        assert_eq!((baggage.iter().count(), dropped), (64, true));
        assert!(baggage.get("k63").is_some() && baggage.get("k64").is_none());

        let longest = format!("a={}", "x".repeat(MAX_BAGGAGE_BYTES - 2));
        let (baggage, dropped) = Baggage::parse(&longest);
        assert_eq!((baggage.to_string(), dropped), (longest.clone(), false));
        let (baggage, dropped) = Baggage::parse(&format!("b=1,{longest}"));
        assert_eq!((baggage.to_string(), dropped), ("b=1".into(), true));

        let mut wide = Baggage::default();
        wide.insert("a", &"ä".repeat(2000));
        wide.insert("b", "1");
        assert_eq!(wide.to_string(), "b=1");
    }

    #[test]
    fn callers_baggage_goes_on_as_far_as_it_is_allowed_and_never_replaces_ours() {
        let mut own = Baggage::default();
        own.insert("namespace", "shop");
        allow_baggage(&["tenant".into(), "namespace".into()]);
        pass_on(&mut own, "tenant=acme,secret=1,namespace=other");
        assert_eq!(own.to_string(), "namespace=shop,tenant=acme");
        allow_baggage(&[]);
    }

    #[test]
    fn baggage_keys_not_on_the_list_are_dropped() {
        let (mut baggage, _) = Baggage::parse("secret=1,correlation_id=order-1,Namespace=x");
        baggage.allow(&DEFAULT_BAGGAGE_KEYS);
        assert_eq!(baggage.to_string(), "correlation_id=order-1");
    }

    #[test]
    fn malformed_context_is_ignored_and_told() {
        let none = Incoming::parse(None, None, None);
        assert_eq!(none, Incoming::default());
        let state_alone = Incoming::parse(None, Some("a=1"), None);
        assert_eq!(state_alone, Incoming::default());
        let bad = Incoming::parse(Some("x"), Some("a=1"), Some("a=1"));
        assert!(bad.malformed && bad.traceparent.is_none() && bad.tracestate.is_none());
        assert_eq!(bad.baggage.get("a"), Some("1"));
        let bad_state = Incoming::parse(Some(VALID), Some("x"), None);
        assert!(bad_state.malformed && bad_state.traceparent.is_some());
        assert!(!Incoming::parse(Some(VALID), Some(""), None).malformed);
    }

    #[test]
    fn what_is_injected_is_extracted_again() {
        let parent: Traceparent = VALID.parse().unwrap();
        let (baggage, _) = Baggage::parse("namespace=n,correlation_id=order%204711");
        let cx = to_otel_context(&parent, Some("vendor=1"), &baggage);
        assert!(cx.span().span_context().is_remote());
        let mut headers = HashMap::new();
        {
            let _current = cx.attach();
            inject_current(&mut headers);
        }
        assert_eq!(headers["traceparent"], VALID);
        assert_eq!(headers["tracestate"], "vendor=1");
        assert_eq!(headers["baggage"], "correlation_id=order%204711,namespace=n");
        let shouted = headers.into_iter().map(|(k, v)| (k.to_uppercase(), v)).collect::<HashMap<_, _>>();
        let back = extract(&shouted);
        assert_eq!(back.traceparent, Some(parent));
        assert_eq!(back.tracestate.as_deref(), Some("vendor=1"));
        assert_eq!(back.baggage.get("correlation_id"), Some("order 4711"));
        assert!(!back.malformed);
    }

    #[test]
    fn without_a_current_span_nothing_is_injected() {
        let _none = Context::new().attach();
        let mut headers = HashMap::new();
        inject_current(&mut headers);
        assert_eq!(headers, HashMap::new());
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,80}", hexish in "[0-9a-fA-F-]{50,60}") {
            for text in [&text, &hexish] {
                let _ = text.parse::<Traceparent>();
                let _ = tracestate(text);
                let (baggage, _) = Baggage::parse(text);
                let (again, dropped) = Baggage::parse(&baggage.to_string());
                prop_assert_eq!((again, dropped), (baggage, false));
            }
        }

        #[test]
        fn a_traceparent_reads_back_as_written(trace_id: [u8; 16], span_id: [u8; 8], sampled: bool) {
            prop_assume!(trace_id != [0; 16] && span_id != [0; 8]);
            let parent = Traceparent { trace_id, span_id, flags: sampled.into() };
            prop_assert_eq!(parent.to_string().parse(), Ok(parent));
        }
    }
}
