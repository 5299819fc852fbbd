use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Twenty forms that the built-in policy names, each with the part that must not be seen.
const SECRETS: [(&str, &str); 26] = [
    ("Authorization: Bearer c4n4ry-0001", "c4n4ry-0001"),
    ("authorization=Basic dXNlcjpjNG40cnk=", "dXNlcjpjNG40cnk="),
    ("call failed with Bearer c4n4ry0003abc", "c4n4ry0003abc"),
    ("postgres://app:c4n4ry0004@db:5432/shop", "c4n4ry0004"),
    ("https://c4n4ry0005@github.com/x.git", "c4n4ry0005"),
    ("amqp://u:p@c4n4ry0006@mq/", "c4n4ry0006"),
    ("password=c4n4ry0007", "c4n4ry0007"),
    (r#"{"password": "c4n4ry 0008"}"#, "c4n4ry 0008"),
    (r#"{\"api_key\": \"c4n4ry0009\"}"#, "c4n4ry0009"),
    ("X-Api-Key: c4n4ry0010", "c4n4ry0010"),
    ("Cookie: a=1; session=c4n4ry0011", "c4n4ry0011"),
    ("Set-Cookie: sid=c4n4ry0012; HttpOnly", "c4n4ry0012"),
    ("GET /x?page=2&access_token=c4n4ry0013&y=1", "c4n4ry0013"),
    ("GET https://s3/x?X-Amz-Signature=c4n4ry0014", "c4n4ry0014"),
    ("-----BEGIN RSA PRIVATE KEY-----\nc4n4ry0015\n-----END RSA PRIVATE KEY-----", "c4n4ry0015"),
    ("-----BEGIN PRIVATE KEY-----\nc4n4ry0016 and then it was cut", "c4n4ry0016"),
    ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjNG40cnkifQ.c4n4ry17", "eyJzdWIiOiJjNG40cnkifQ"),
    ("AKIAC4N4RY0018ABCDEF", "AKIAC4N4RY0018ABCDEF"),
    ("token ghp_c4n4ry0019abcdefghijklmn", "ghp_c4n4ry0019abcdefghijklmn"),
    ("sk_live_c4n4ry0020abcd", "sk_live_c4n4ry0020abcd"),
    ("xoxb-c4n4ry0021-abcdef", "xoxb-c4n4ry0021-abcdef"),
    ("the key sk-proj-c4n4ry0022abcdef", "sk-proj-c4n4ry0022abcdef"),
    ("card 4111 1111 1111 1111 was refused", "4111 1111 1111 1111"),
    ("card_number=5555555555554444", "5555555555554444"),
    ("https://hooks.slack.com/services/T0/B0/c4n4ry0025", "c4n4ry0025"),
    ("ran tool --token c4n4ry0026", "c4n4ry0026"),
];

#[test]
fn each_form_of_the_built_in_policy_is_hidden_and_what_is_around_it_stays() {
    let policy = Policy::default();
    for (said, secret) in SECRETS {
        let around = format!("before, {said}\nafter");
        let clean = policy.text(&around);
        assert!(!clean.contains(secret), "{clean}");
        assert!(clean.contains(REDACTED), "{clean}");
        assert!(clean.starts_with("before, "), "{clean}");
        assert_eq!(policy.text(&clean), clean, "twice is once");
        let mut payload = json!({"deep": [{"note": around}]});
        policy.json(&mut payload);
        assert!(!payload.to_string().contains(secret), "{payload}");
    }
    assert_eq!(policy.text("postgres://app:x@db:5432/shop?a=1"), "postgres://[redacted]@db:5432/shop?a=1");
    assert_eq!(policy.text(r#"{"password": "a b", "user": "u"}"#), r#"{"password": "[redacted]", "user": "u"}"#);
    assert_eq!(policy.text("GET /x?token=1&y=2 failed"), "GET /x?token=[redacted]&y=2 failed");
}

#[test]
fn json_stays_json() {
    for (said, clean) in [
        (r#"{"token":null,"pwd":12}"#, r#"{"token":null,"pwd":"[redacted]"}"#),
        (r#"{"cookie": null, "next": "a"}"#, r#"{"cookie": null, "next": "a"}"#),
        (r#"{"cookie": "a=b; c", "next": "a"}"#, r#"{"cookie": "[redacted]", "next": "a"}"#),
        (r#"{"x":"password=abc","y":1}"#, r#"{"x":"password=[redacted]","y":1}"#),
        (r#""{\"secret\": \"abc\", \"b\": 1}""#, r#""{\"secret\": \"[redacted]\", \"b\": 1}""#),
    ] {
        assert_eq!(Policy::default().text(said), clean);
        assert!(serde_json::from_str::<Value>(clean).is_ok(), "{clean}");
    }
    assert_eq!(document(r#"{"b":1,"a":{"token":5}}"#), r#"{"a":{"token":"[redacted]"},"b":1}"#);
    assert_eq!(document(r#"{"b":1,"a":2}"#), r#"{"b":1,"a":2}"#);
    assert_eq!(document("{ password=1"), "{ password=[redacted]");
}

#[test]
fn what_only_looks_like_a_secret_stays() {
    for harmless in [
        "the bearer instruments are gone",
        "basic authentication is not enough",
        "GET https://api.example.com:8443/users/me?page=2 answered 500",
        "mail to someone@example.com failed",
        "order 4111 1111 1111 1112 is unknown",
        "01931b3c-7c7e-7f4c-9a55-0123456789ab",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736 took 1732200000000000 ns",
        "the token has expired",
        "1500 tokens used",
        "",
    ] {
        assert_eq!(Policy::default().text(harmless), harmless);
    }
}

#[test]
fn names_tell_secret_fields() {
    for secret in [
        "password",
        "db.password",
        "apiKey",
        "X-Api-Key",
        "API_KEY",
        "clientSecret",
        "refresh_token",
        "Set-Cookie",
        "http.request.header.authorization",
        "creditCard",
        "userPassword1_password",
    ] {
        assert!(forms::is_secret_name(secret), "{secret}");
    }
    for open in [
        "token_count",
        "gen_ai.usage.input_tokens",
        "tokenType",
        "compassword",
        "company",
        "span",
        "order_id",
        "secretary",
        "key",
        "author",
    ] {
        assert!(!forms::is_secret_name(open), "{open}");
    }
}

#[test]
fn rules_decide_before_the_built_in_ones_and_the_first_that_fits() {
    let policy = Policy::parse(
        "version: shop-3\nrules:\n  - {attribute: http.request.header.x-trace, do: allow}\n  - {attribute: 'http.request.header.*', do: deny}\n  \
         - {attribute: customer.id, do: hash}\n  - {path: $.customer.email, do: hash}\n  - {path: '$.lines[*].note', do: deny}\n  \
         - {path: $..iban, do: mask}\n  - {path: $.password, do: allow}\n",
    )
    .unwrap();
    assert_eq!(policy.attribute("HTTP.request.header.X-Trace", "token=1").as_deref(), Some("token=1"));
    assert_eq!(policy.attribute("http.request.header.accept", "x"), None);
    assert_eq!(policy.attribute("db.password", "x").as_deref(), Some(REDACTED));
    assert_eq!(policy.attribute("note", "password=x").as_deref(), Some("password=[redacted]"));
    let hashed = policy.attribute("customer.id", "4711").unwrap().into_owned();
    assert!(hashed.starts_with("sha256:") && hashed.len() == 23);
    assert_eq!(policy.attribute("customer.id", &hashed).as_deref(), Some(&*hashed), "twice is once");

    let mut payload = json!({
        "customer": {"email": "a@b.c", "name": "A", "bank": {"iban": "DE1"}},
        "lines": [{"note": "n", "amount": 1}, {"note": "m", "amount": 2}],
        "password": "known to all", "deep": {"password": 1234, "has_token": true, "token": null},
    });
    policy.json(&mut payload);
    assert_eq!(
        payload,
        json!({
            "customer": {"email": payload["customer"]["email"], "name": "A", "bank": {"iban": REDACTED}},
            "lines": [{"amount": 1}, {"amount": 2}],
            "password": "known to all", "deep": {"password": REDACTED, "has_token": true, "token": null},
        })
    );
    assert!(payload["customer"]["email"].as_str().unwrap().starts_with("sha256:"));
}

#[test]
fn a_policy_that_cannot_be_used_says_where_and_why() {
    let refused = |text: &str| Policy::parse(text).unwrap_err().to_string();
    assert!(refused("version: 1x\nrules: [{do: deny}]").contains("rules[0]: give either attribute or path"));
    assert!(refused("version: x\nrules: [{path: customer, do: deny}]").contains("\"customer\" is not a path"));
    assert!(refused("version: x\nrules: [{path: '$', do: deny}]").contains("is not a path"));
    assert!(refused("version: x\nrules: [{path: $.a, do: burn}]").contains("allow"));
    assert!(refused("rulez: []").contains("redaction policy"));
}

proptest! {
    #[test]
    fn no_text_makes_it_fail_and_twice_is_once(said in "(password|token|Bearer|[:=@/?&\"' {}\\[\\]\\\\-]|[a-zA-Z0-9]{1,9}|\\PC){0,40}") {
        let policy = Policy::default();
        let once = policy.text(&said).into_owned();
        prop_assert_eq!(policy.text(&once).into_owned(), once);
    }
}

#[test]
fn a_megabyte_of_bait_is_done_in_no_time() {
    let policy = Policy::default();
    let began = std::time::Instant::now();
    for bait in ["password=", "a-", "-----BEGIN ", "4111 ", "://@", "\\\"token\\\": \\\""] {
        let text = bait.repeat((1 << 20) / bait.len());
        assert!(policy.text(&text).len() <= MAX_TEXT_BYTES * 3);
    }
    // Unoptimized, on a busy machine; a pattern that is not linear takes minutes.
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_schema_says_what_a_secret_looks_like_and_never_what_it_is() {
    let definition = json!({"input_schema": {
        "type": "object",
        "required": ["password"],
        "properties": {
            "password": {"type": "string", "minLength": 8, "description": "At least 8 characters"},
            "login": {"type": "object", "properties": {"token": {"type": ["string", "null"]}}},
            "cards": {"type": "array", "items": {"properties": {"card_number": {"pattern": "^[0-9]+$"}}}},
            "colour": {"enum": ["red"], "default": "red"},
        },
    }});
    assert_eq!(shown(&definition), None, "nothing of it is a value");

    let mut leaky = json!({"input_schema": {"properties": {
        "password": {"type": "string", "default": "hunter2", "examples": ["hunter2"], "const": "hunter2", "enum": ["hunter2"],
            "note": {"a": "hunter2"}, "anyOf": [{"default": "hunter2"}], "items": {"default": "hunter2"}},
        "token": "hunter2",
        "session_id": ["hunter2"],
        "url": {"default": "https://user:hunter2@host"},
        "login": {"properties": {"api_key": {"default": "hunter2"}}, "password": "hunter2"},
    }}});
    json(&mut leaky);
    assert!(!leaky.to_string().contains("hunter2"), "{leaky}");
    assert_eq!(leaky["input_schema"]["properties"]["password"]["type"], "string");
    // The same in a payload that is no schema.
    for mut payload in [
        json!({"properties": {"password": {"type": "hunter2"}}}),
        json!({"input_schema": "password=hunter2"}),
        json!({"input_schema": {"password": "hunter2"}}),
        json!({"input": {"input_schema": {"properties": {"password": "hunter2"}}}}),
    ] {
        json(&mut payload);
        assert!(!payload.to_string().contains("hunter2"), "{payload}");
    }
}
