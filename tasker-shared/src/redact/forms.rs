//! The built-in policy: names of fields that hold secrets, and forms that secrets take in text.
//!
//! Change [`super::DEFAULT_VERSION`] with any rule here.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex, RegexSet};

use super::REDACTED;

/// A field whose name, in words, holds one of these is secret.
const SECRET_WORDS: [&str; 34] = [
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "secrets",
    "token",
    "apikey",
    "api_key",
    "access_key",
    "account_key",
    "private_key",
    "secret_key",
    "signing_key",
    "encryption_key",
    "credential",
    "credentials",
    "authorization",
    "cookie",
    "cookies",
    "session_id",
    "sessionid",
    "session_key",
    "cvv",
    "cvc",
    "card_number",
    "cardnumber",
    "credit_card",
    "pan",
    "ssn",
    "pin_code",
    "otp",
    "connection_string",
    "bearer",
];

/// Unless it ends so: it tells something about a secret.
const HARMLESS_ENDS: [&str; 10] =
    ["count", "type", "limit", "expires", "expires_in", "expires_at", "expiry", "ttl", "length", "name"];

/// Whether a field of that name holds a secret: `apiKey`, `X-Api-Key` and `db.password` do,
/// `token_count` and `gen_ai.usage.input_tokens` do not.
pub(super) fn is_secret_name(name: &str) -> bool {
    if name.len() > 200 {
        return false;
    }
    let words = in_words(name);
    let has = |word: &str| {
        words.match_indices(word).any(|(at, _)| {
            let end = at + word.len();
            (at == 0 || words.as_bytes()[at - 1] == b'_') && (end == words.len() || words.as_bytes()[end] == b'_')
        })
    };
    SECRET_WORDS.iter().any(|word| has(word))
        && !HARMLESS_ENDS.iter().any(|end| words.strip_suffix(end).is_some_and(|rest| rest.ends_with('_')))
}

/// `apiKey`, `API-Key` and `api.key` as `api_key`.
fn in_words(name: &str) -> String {
    let mut words = String::with_capacity(name.len() + 4);
    let mut before = ' ';
    for c in name.chars() {
        if c.is_ascii_alphanumeric() {
            if c.is_ascii_uppercase() && (before.is_ascii_lowercase() || before.is_ascii_digit()) {
                words.push('_');
            }
            words.push(c.to_ascii_lowercase());
        } else if !words.ends_with('_') {
            words.push('_');
        }
        before = c;
    }
    words
}

/// What a form is found by, and what is put in its place.
struct Form {
    pattern: &'static str,
    replace: fn(&Captures<'_>) -> String,
}

fn all(_: &Captures<'_>) -> String {
    REDACTED.to_owned()
}

/// Keeps the first group.
fn rest(found: &Captures<'_>) -> String {
    format!("{}{REDACTED}", &found[1])
}

/// Keeps the first group, and everything if the value is redacted already or says nothing. JSON
/// stays JSON: a quoted value keeps its quotes, a bare one behind a quoted key gets some.
fn value(found: &Captures<'_>) -> String {
    let (before, value) = (&found[1], &found[2]);
    let bare = value.trim_start_matches(['"', '\'', '\\']);
    if bare.starts_with("[redacted") || matches!(value, "null" | "true" | "false") {
        return found[0].to_owned();
    }
    let escaped = if value.starts_with('\\') { "\\" } else { "" };
    let key = before.trim_end_matches([' ', '\t', ':', '=']);
    let quote = match value[escaped.len()..].chars().next() {
        Some(c @ ('"' | '\'')) => Some(c),
        _ => key.chars().next_back().filter(|c| *c == '"' && before.len() > key.len()),
    };
    match quote {
        Some(quote) => format!("{before}{escaped}{quote}{REDACTED}{escaped}{quote}"),
        None => format!("{before}{REDACTED}"),
    }
}

/// Only what looks made by a machine: `Bearer abc123…`, not "bearer instruments".
fn scheme(found: &Captures<'_>) -> String {
    if found[2].bytes().any(|b| !b.is_ascii_lowercase()) { rest(found) } else { found[0].to_owned() }
}

/// Only what passes the check of card numbers.
fn card(found: &Captures<'_>) -> String {
    let digits: Vec<u32> = found[0].chars().filter_map(|c| c.to_digit(10)).collect();
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| match (place % 2, digit * 2) {
            (0, _) => *digit,
            (_, double) if double > 9 => double - 9,
            (_, double) => double,
        })
        .sum();
    let known = matches!(
        (digits.len(), digits[0], digits[0] * 10 + digits[1]),
        (13 | 16 | 19, 4, _) | (15, _, 34 | 37) | (16, _, 22..=27 | 35 | 51..=55 | 60..=65)
    );
    if known && sum.is_multiple_of(10) { REDACTED.to_owned() } else { found[0].to_owned() }
}

/// From the widest to the narrowest: what one has replaced the next does not see.
const FORMS: [Form; 11] = [
    // A private key, also one that was cut off.
    Form {
        pattern: r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----(?s:.*?)(-----END [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----|\z)",
        replace: all,
    },
    // Headers: to the end of the line, or of the quoted text behind a quoted name.
    Form {
        pattern: r#"(?i)(\b(?:(?:proxy-)?authorization|(?:set-)?cookie)\s*[:=]\s*["']?)([^\r\n"'\\]+)"#,
        replace: |found| if found[2].starts_with("[redacted") { found[0].to_owned() } else { rest(found) },
    },
    Form {
        pattern: r#"(?i)(\b(?:(?:proxy-)?authorization|(?:set-)?cookie)\\?["']\s*[:=]\s*)(\\?"[^"\r\n]*"?|'[^'\r\n]*'?)"#,
        replace: value,
    },
    // scheme://user:password@host
    Form {
        pattern: r#"(?i)(\b[a-z][a-z0-9+.-]{1,20}://)[^\s/?#"'<>@]+(?:@[^\s/?#"'<>@]+)*@"#,
        replace: |found| format!("{}{REDACTED}@", &found[1]),
    },
    Form { pattern: r"(?i)(\bhooks\.slack\.com/(?:services|workflows)/)[A-Za-z0-9/_-]+", replace: rest },
    // password=…, "api_key": "…", --token …
    Form {
        pattern: r#"(?ix)
            ( \b [a-z0-9_.-]{0,60}?
              (?: password | passwd | passphrase | pwd | secret | token | api[_-]?key | access[_-]?key | account[_-]?key
                | private[_-]?key | secret[_-]?key | signing[_-]?key | credentials? | session[_-]?id | cvv2? | cvc
                | card[_-]?number )
              \\?["']? \s*[:=]\s* )
            ( \\?"[^"\r\n]*"? | '[^'\r\n]*'? | [^\s,;&}\])>"']+ )"#,
        replace: value,
    },
    Form { pattern: r"(?i)(--(?:password|passwd|secret|token|api-?key)\s+)([^\s-][^\s]*)", replace: value },
    // Parameters of signed URLs.
    Form {
        pattern: r#"(?i)([?&](?:key|sig|signature|code|auth|x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential)=)([^&\s#"'<>]+)"#,
        replace: value,
    },
    Form { pattern: r"(?i)(\b(?:bearer|basic|digest|negotiate|apikey)\s+)([A-Za-z0-9._~+/=-]{8,})", replace: scheme },
    // Keys that tell what they are by their beginning.
    Form {
        pattern: r"(?x)
              \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?
            | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
            | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,}
            | \bglpat-[A-Za-z0-9_-]{16,}
            | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bxapp-[A-Za-z0-9-]{10,}
            | \b[rsp]k_(?:live|test)_[A-Za-z0-9]{10,} | \bwhsec_[A-Za-z0-9+/=]{10,}
            | \bsk-[A-Za-z0-9_-]{16,}
            | \bAIza[0-9A-Za-z_-]{35} | \bya29\.[0-9A-Za-z_-]{10,}
            | \bnpm_[A-Za-z0-9]{20,} | \bpypi-[A-Za-z0-9_-]{20,} | \bhf_[A-Za-z0-9]{20,}
            | \bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}
            | \bdop_v1_[a-f0-9]{32,} | \bvault:v[0-9]+:[A-Za-z0-9+/=]{16,} | \bhvs\.[A-Za-z0-9_-]{20,}",
        replace: all,
    },
    Form { pattern: r"\b[2-6](?:[ -]?[0-9]){12,18}\b", replace: card },
];

struct Compiled {
    any: RegexSet,
    each: Vec<Regex>,
}

static COMPILED: LazyLock<Compiled> = LazyLock::new(|| Compiled {
    any: RegexSet::new(FORMS.iter().map(|form| form.pattern)).expect("the forms are patterns"),
    each: FORMS.iter().map(|form| Regex::new(form.pattern).expect("a pattern")).collect(),
});

pub(super) fn redact(text: &str) -> Cow<'_, str> {
    // No form is shorter.
    if text.len() < 6 {
        return Cow::Borrowed(text);
    }
    let mut clean = Cow::Borrowed(text);
    for place in COMPILED.any.matches(text) {
        // Replaced or not: some forms look again at what they found.
        let replaced = match COMPILED.each[place].replace_all(&clean, FORMS[place].replace) {
            Cow::Owned(replaced) if replaced != *clean => replaced,
            _ => continue,
        };
        clean = Cow::Owned(replaced);
    }
    clean
}
