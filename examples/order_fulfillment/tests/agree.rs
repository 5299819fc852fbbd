//! The template, the handlers and the expectation agree on every order.

use std::collections::{BTreeSet, HashMap};

use order_fulfillment_example::expected::expected;
use order_fulfillment_example::handlers::{self, Failure};
use order_fulfillment_example::{Closed, Order, ShippingMethod, TEMPLATE, Tier, orders};
use serde_json::Value;
use tasker_shared::template::{Checked, InputSchema, parse};

fn template() -> Checked {
    parse("order.yaml", TEMPLATE).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// Runs the steps in the order of the graph, each until it succeeds or fails
/// for good; the outputs of all steps, and how often each ran.
fn run(checked: &Checked, order: &Order) -> Result<HashMap<String, (Value, u32)>, Failure> {
    let input = serde_json::to_value(order).unwrap();
    let mut done: HashMap<String, (Value, u32)> = HashMap::new();
    let definition = &checked.compiled.definition;
    for &index in definition.graph.topological_order() {
        let step = &checked.template.steps[index as usize];
        let references = definition.steps[index as usize].input.as_ref().expect("every step has an input");
        let resolved = references
            .resolve(&input, &|name| done.get(name).map(|(output, _)| output))
            .unwrap_or_else(|missing| panic!("{}: {missing}", step.name));
        let mut attempt = 1;
        let output = loop {
            match handlers::call(&step.handler, resolved.clone(), attempt) {
                Ok(output) => break output,
                Err(failure) if failure.retryable && attempt < step.retry.max_attempts => {
                    attempt += 1;
                }
                Err(failure) => return Err(failure),
            }
        };
        done.insert(step.name.clone(), (output, attempt));
    }
    Ok(done)
}

fn result(outputs: &HashMap<String, (Value, u32)>) -> Closed {
    serde_json::from_value(outputs["close"].0.clone()).unwrap()
}

#[test]
fn every_order_comes_to_what_is_expected() {
    let checked = template();
    let all = orders();
    assert!(all.len() >= 20);
    for order in &all {
        let outputs = run(&checked, order).unwrap_or_else(|failure| panic!("{failure:?}"));
        assert_eq!(Some(result(&outputs)), expected(order), "{}", order.order_id);
        for (step, (_, attempts)) in &outputs {
            assert_eq!(*attempts, if step == "charge" { 2 } else { 1 }, "{step}");
        }
    }
}

/// One order worked out by hand from the README, so that both computations
/// cannot share a misreading: 2 × 12.90 + 3 × 8.95 = 52.65, 19 % of it is
/// 10.0035, and 1490 g begin one kilogram beyond the first.
#[test]
fn first_order_comes_to_what_a_person_computes() {
    let order = &orders()[0];
    let closed = Closed {
        order_id: "ORD-1001".into(),
        status: "completed".into(),
        currency: "EUR".into(),
        subtotal_cents: 5265,
        discount_cents: 0,
        tax_cents: 1000,
        shipping_cents: 549,
        total_cents: 6814,
        payment_id: "pay-ORD-1001-24".into(),
        tracking: Some("FRA1-1001-35".into()),
        parcels: 1,
        receipt: "R-1001".into(),
        points_balance: 1240 + 105,
    };
    assert_eq!(expected(order), Some(closed));
}

#[test]
fn template_uses_every_handler_and_no_other() {
    let checked = template();
    let used: BTreeSet<&str> = checked.template.steps.iter().map(|step| step.handler.as_str()).collect();
    assert_eq!(used, handlers::NAMES.into_iter().collect());
    assert!(checked.compiled.definition.graph.len() >= 8);
}

#[test]
fn orders_satisfy_the_schema_and_differ() {
    let checked = template();
    let schema = InputSchema::compile(checked.template.input_schema.as_ref().unwrap()).unwrap();
    let all = orders();
    for order in &all {
        assert_eq!(schema.check(&serde_json::to_value(order).unwrap()), Ok(()));
    }
    let ids: BTreeSet<&str> = all.iter().map(|order| order.order_id.as_str()).collect();
    assert_eq!(ids.len(), all.len());
}

/// The orders exercise the rules: every coupon, method, tier, zone and outcome.
#[test]
fn orders_reach_every_rule() {
    let all = orders();
    let results: Vec<Closed> = all.iter().map(|order| expected(order).unwrap()).collect();
    let coupons: BTreeSet<_> = all.iter().filter_map(|order| order.coupon.as_deref()).collect();
    assert_eq!(coupons.len(), 4);
    let countries: BTreeSet<_> = all.iter().map(|order| &order.shipping_country).collect();
    assert_eq!(countries.len(), 9);
    for method in [ShippingMethod::Standard, ShippingMethod::Express, ShippingMethod::Pickup] {
        assert!(all.iter().any(|order| order.shipping_method == method));
    }
    for tier in [Tier::Basic, Tier::Silver, Tier::Gold] {
        assert!(all.iter().any(|order| order.customer.tier == tier));
    }
    assert!(results.iter().any(|closed| closed.status == "completed_after_review"));
    assert!(results.iter().any(|closed| closed.tracking.is_none()));
    assert!(results.iter().any(|closed| closed.parcels > 1));
    assert!(results.iter().any(|closed| closed.shipping_cents == 0 && closed.tracking.is_some()));
}

#[test]
fn orders_that_break_a_rule_are_refused_for_good() {
    type Spoil = fn(&mut Order);
    let checked = template();
    let good = orders().remove(0);
    let cases: [(&str, Spoil); 8] = [
        ("BadItems", |order| order.items.clear()),
        ("BadItems", |order| order.items.push(order.items[0].clone())),
        ("BadQuantity", |order| order.items[0].quantity = 0),
        ("BadQuantity", |order| order.items[1].quantity = 1000),
        ("UnknownCountry", |order| {
            order.billing_country = "XX".into();
        }),
        ("UnknownCountry", |order| {
            order.shipping_country = "de".into();
        }),
        ("UnknownCoupon", |order| {
            order.coupon = Some("SAVE501".into());
        }),
        ("FraudSuspected", |order| {
            order.items[0].quantity = 100;
            order.shipping_method = ShippingMethod::Express;
            order.shipping_country = "US".into();
        }),
    ];
    for (error_type, spoil) in cases {
        let mut order = good.clone();
        spoil(&mut order);
        let failure = run(&checked, &order).expect_err(error_type);
        assert_eq!((failure.error_type, failure.retryable), (error_type, false));
    }
}

#[test]
fn charge_gives_the_same_payment_on_every_later_attempt() {
    let input = serde_json::json!({"order_id": "ORD-1", "amount_cents": 100, "currency": "EUR",
                                   "decision": "approve", "statement": "x"});
    let first = handlers::call("payments.charge", input.clone(), 1).unwrap_err();
    assert_eq!((first.error_type, first.retryable), ("GatewayTimeout", true));
    let second = handlers::call("payments.charge", input.clone(), 2);
    assert_eq!(second, handlers::call("payments.charge", input, 3));
    assert!(second.is_ok());
}
