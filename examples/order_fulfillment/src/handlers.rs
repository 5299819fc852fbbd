//! The handlers of `order.yaml`, one pure function per step.
//!
//! [`call`] finds a handler by its name and speaks JSON, which is all a worker
//! needs to offer them.

use std::collections::HashSet;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{Closed, Order, ShippingMethod, Tier};

/// Why a handler failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whether trying again may help.
    pub retryable: bool,
    /// A name that a template can list in `non_retryable_errors`.
    pub error_type: &'static str,
    /// For people.
    pub message: String,
}

impl Failure {
    fn fail(error_type: &'static str, message: impl Into<String>) -> Self {
        Self { retryable: false, error_type, message: message.into() }
    }

    fn retry(error_type: &'static str, message: impl Into<String>) -> Self {
        Self { retryable: true, error_type, message: message.into() }
    }
}

/// The names under which a worker offers the handlers.
pub const NAMES: [&str; 9] = [
    "orders.validate",
    "inventory.reserve",
    "fraud.check",
    "pricing.quote",
    "payments.charge",
    "shipping.create",
    "notifications.receipt",
    "loyalty.award",
    "orders.close",
];

/// Runs the handler of that name. `attempt` counts from 1 in a task's step.
pub fn call(handler: &str, input: Value, attempt: u32) -> Result<Value, Failure> {
    match handler {
        "orders.validate" => typed(input, validate),
        "inventory.reserve" => typed(input, reserve),
        "fraud.check" => typed(input, check_fraud),
        "pricing.quote" => typed(input, quote),
        "payments.charge" => typed(input, |input| charge(input, attempt)),
        "shipping.create" => typed(input, ship),
        "notifications.receipt" => typed(input, send_receipt),
        "loyalty.award" => typed(input, award),
        "orders.close" => typed(input, close),
        other => Err(Failure::fail("UnknownHandler", format!("no handler is named {other}"))),
    }
}

fn typed<I: DeserializeOwned, O: Serialize>(
    input: Value,
    handler: impl FnOnce(&I) -> Result<O, Failure>,
) -> Result<Value, Failure> {
    let input = serde_json::from_value(input).map_err(|error| Failure::fail("BadInput", error.to_string()))?;
    let output = handler(&input)?;
    serde_json::to_value(output).map_err(|error| Failure::fail("BadOutput", error.to_string()))
}

/// What the business knows of a country.
struct Country {
    code: &'static str,
    tax_basis_points: u64,
    zone: Zone,
    warehouse: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Zone {
    Home,
    Europe,
    World,
}

const fn country_row(code: &'static str, tax_basis_points: u64, zone: Zone, warehouse: &'static str) -> Country {
    Country { code, tax_basis_points, zone, warehouse }
}

const COUNTRIES: [Country; 9] = [
    country_row("DE", 1900, Zone::Home, "FRA1"),
    country_row("AT", 2000, Zone::Europe, "FRA1"),
    country_row("FR", 2000, Zone::Europe, "FRA1"),
    country_row("NL", 2100, Zone::Europe, "FRA1"),
    country_row("SE", 2500, Zone::Europe, "FRA1"),
    country_row("CH", 810, Zone::Europe, "FRA1"),
    country_row("GB", 2000, Zone::Europe, "LHR2"),
    country_row("US", 0, Zone::World, "EWR1"),
    country_row("CA", 500, Zone::World, "EWR1"),
];

const COUPONS: [&str; 4] = ["WELCOME10", "SAVE500", "BULK15", "FREESHIP"];

fn country(code: &str) -> Result<&'static Country, Failure> {
    COUNTRIES
        .iter()
        .find(|country| country.code == code)
        .ok_or_else(|| Failure::fail("UnknownCountry", format!("{code} is not served")))
}

/// Two check digits.
fn check_digits(number: u64) -> String {
    format!("{:02}", number % 97)
}

/// The digits of an order's id.
fn number(order_id: &str) -> &str {
    order_id.trim_start_matches("ORD-")
}

/// A line of a validated order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// Stock keeping unit.
    pub sku: String,
    /// How many.
    pub quantity: u64,
    /// Quantity times price.
    pub line_cents: u64,
}

/// Output of `validate`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Validated {
    /// The order's lines.
    pub lines: Vec<Line>,
    /// Sum of all lines.
    pub subtotal_cents: u64,
    /// Sum of all quantities.
    pub units: u64,
    /// Of the whole order.
    pub weight_grams: u64,
}

/// Checks the order and adds it up.
pub fn validate(order: &Order) -> Result<Validated, Failure> {
    if !(1..=50).contains(&order.items.len()) {
        return Err(Failure::fail("BadItems", "an order has 1 to 50 items"));
    }
    country(&order.billing_country)?;
    country(&order.shipping_country)?;
    if let Some(coupon) = &order.coupon
        && !COUPONS.contains(&coupon.as_str())
    {
        return Err(Failure::fail("UnknownCoupon", format!("there is no coupon {coupon}")));
    }
    let mut validated = Validated { lines: Vec::new(), subtotal_cents: 0, units: 0, weight_grams: 0 };
    let mut seen = HashSet::new();
    for item in &order.items {
        if !(1..=999).contains(&item.quantity) {
            let message = format!("the quantity of {} is not 1 to 999", item.sku);
            return Err(Failure::fail("BadQuantity", message));
        }
        if !seen.insert(&item.sku) {
            return Err(Failure::fail("BadItems", format!("{} is listed twice", item.sku)));
        }
        let line_cents = item.quantity * item.unit_price_cents;
        validated.subtotal_cents += line_cents;
        validated.units += item.quantity;
        validated.weight_grams += item.quantity * item.weight_grams;
        let (sku, quantity) = (item.sku.clone(), item.quantity);
        validated.lines.push(Line { sku, quantity, line_cents });
    }
    Ok(validated)
}

/// Input of `reserve_inventory`.
#[derive(Debug, Deserialize)]
pub struct Reserve {
    /// The order's id.
    pub order_id: String,
    /// Shipping country.
    pub country: String,
    /// What to hold.
    pub lines: Vec<Line>,
}

/// Output of `reserve_inventory`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reserved {
    /// Names the hold.
    pub hold_id: String,
    /// Where the goods are.
    pub warehouse: String,
}

/// Holds the goods in the warehouse that serves the country.
pub fn reserve(input: &Reserve) -> Result<Reserved, Failure> {
    let sum = (1..).zip(&input.lines).map(|(place, line)| place * line.quantity).sum();
    Ok(Reserved {
        hold_id: format!("hold-{}-{}", input.order_id, check_digits(sum)),
        warehouse: country(&input.country)?.warehouse.to_owned(),
    })
}

/// Input of `fraud_check`.
#[derive(Debug, Deserialize)]
pub struct FraudCheck {
    /// Sum of all lines.
    pub subtotal_cents: u64,
    /// Country of the payer.
    pub billing_country: String,
    /// Country of the goods.
    pub shipping_country: String,
    /// How the goods travel.
    pub shipping_method: ShippingMethod,
    /// Whether the customer is new.
    pub first_order: bool,
}

/// Whether a person looks at the order before the money is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Go on.
    Approve,
    /// Go on, but only authorize the payment and award no points.
    Review,
}

/// Output of `fraud_check`.
#[derive(Debug, Serialize, Deserialize)]
pub struct FraudChecked {
    /// 0 to 90.
    pub score: u64,
    /// What follows from it.
    pub decision: Decision,
}

/// Scores the order.
pub fn check_fraud(input: &FraudCheck) -> Result<FraudChecked, Failure> {
    let mut score = 0;
    if input.subtotal_cents >= 50_000 {
        score += 30;
    }
    if input.shipping_method == ShippingMethod::Express {
        score += 20;
    }
    if input.billing_country != input.shipping_country {
        score += 25;
    }
    if input.first_order {
        score += 15;
    }
    let decision = match score {
        75.. => {
            return Err(Failure::fail("FraudSuspected", format!("the score is {score}")));
        }
        50.. => Decision::Review,
        _ => Decision::Approve,
    };
    Ok(FraudChecked { score, decision })
}

/// Input of `price`.
#[derive(Debug, Deserialize)]
pub struct Quote {
    /// The order's lines.
    pub lines: Vec<Line>,
    /// Sum of all lines.
    pub subtotal_cents: u64,
    /// Of the whole order.
    pub weight_grams: u64,
    /// A coupon's code.
    pub coupon: Option<String>,
    /// Shipping country.
    pub country: String,
    /// How the goods travel.
    pub shipping_method: ShippingMethod,
}

/// Output of `price`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Quoted {
    /// What the coupon takes off.
    pub discount_cents: u64,
    /// Subtotal less discount.
    pub net_cents: u64,
    /// Tax on net.
    pub tax_cents: u64,
    /// Untaxed.
    pub shipping_cents: u64,
    /// Net, tax and shipping.
    pub total_cents: u64,
}

/// Computes what the order costs.
pub fn quote(input: &Quote) -> Result<Quoted, Failure> {
    let country = country(&input.country)?;
    let coupon = input.coupon.as_deref();
    let discount_cents = match coupon {
        Some("WELCOME10") => input.subtotal_cents * 10 / 100,
        Some("SAVE500") if input.subtotal_cents >= 5000 => 500,
        Some("BULK15") => {
            let bulk = input.lines.iter().filter(|line| line.quantity >= 10);
            bulk.map(|line| line.line_cents * 15 / 100).sum()
        }
        _ => 0,
    };
    let net_cents = input.subtotal_cents - discount_cents;
    let tax_cents = (net_cents * country.tax_basis_points + 5000) / 10_000;
    let shipping_cents = match coupon {
        Some("FREESHIP") => 0,
        _ => shipping(input.shipping_method, country.zone, input.weight_grams, net_cents),
    };
    let total_cents = net_cents + tax_cents + shipping_cents;
    Ok(Quoted { discount_cents, net_cents, tax_cents, shipping_cents, total_cents })
}

fn shipping(method: ShippingMethod, zone: Zone, weight_grams: u64, net_cents: u64) -> u64 {
    let (base, per_kilogram) = match method {
        ShippingMethod::Pickup => return 0,
        ShippingMethod::Standard if net_cents >= 10_000 && zone != Zone::World => return 0,
        ShippingMethod::Standard => (499, 50),
        ShippingMethod::Express => (1299, 150),
    };
    let surcharge = match zone {
        Zone::Home => 0,
        Zone::Europe => 300,
        Zone::World => 1200,
    };
    base + weight_grams.saturating_sub(1000).div_ceil(1000) * per_kilogram + surcharge
}

/// Input of `charge`.
#[derive(Debug, Deserialize)]
pub struct Charge {
    /// The order's id.
    pub order_id: String,
    /// What to take.
    pub amount_cents: u64,
    /// The order's currency.
    pub currency: String,
    /// Whether to capture or only to authorize.
    pub decision: Decision,
    /// What the payer reads on the statement.
    pub statement: String,
}

/// Output of `charge`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Charged {
    /// The payment; the same for every attempt.
    pub payment_id: String,
    /// What was taken.
    pub amount_cents: u64,
    /// False if the amount is only authorized.
    pub captured: bool,
}

/// Takes the money. The first attempt fails, as if the gateway had timed out.
pub fn charge(input: &Charge, attempt: u32) -> Result<Charged, Failure> {
    if attempt <= 1 {
        return Err(Failure::retry("GatewayTimeout", "the payment gateway did not answer"));
    }
    let digits = check_digits(input.amount_cents);
    Ok(Charged {
        payment_id: format!("pay-{}-{digits}", input.order_id),
        amount_cents: input.amount_cents,
        captured: input.decision == Decision::Approve,
    })
}

/// Input of `ship`.
#[derive(Debug, Deserialize)]
pub struct Ship {
    /// The order's id.
    pub order_id: String,
    /// Where the goods are.
    pub warehouse: String,
    /// Of the whole order.
    pub weight_grams: u64,
    /// How the goods travel.
    pub shipping_method: ShippingMethod,
}

/// Output of `ship`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Shipped {
    /// None for pickup.
    pub tracking: Option<String>,
    /// At least 1.
    pub parcels: u64,
}

/// Packs the goods and hands them to the carrier.
pub fn ship(input: &Ship) -> Result<Shipped, Failure> {
    let tracking = match input.shipping_method {
        ShippingMethod::Pickup => None,
        ShippingMethod::Standard | ShippingMethod::Express => {
            let (number, digits) = (number(&input.order_id), check_digits(input.weight_grams));
            Some(format!("{}-{number}-{digits}", input.warehouse))
        }
    };
    Ok(Shipped { tracking, parcels: input.weight_grams.div_ceil(20_000).max(1) })
}

/// Input of `send_receipt`.
#[derive(Debug, Deserialize)]
pub struct Receipt {
    /// The order's id.
    pub order_id: String,
    /// Where the receipt goes.
    pub email: String,
    /// The mail's subject.
    pub subject: String,
    /// What was taken.
    pub amount_cents: u64,
    /// The order's currency.
    pub currency: String,
}

/// Output of `send_receipt`.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReceiptSent {
    /// The receipt's number.
    pub receipt: String,
    /// The address, mostly hidden.
    pub to: String,
    /// The amount, as people write it.
    pub amount: String,
}

/// Sends the receipt.
pub fn send_receipt(input: &Receipt) -> Result<ReceiptSent, Failure> {
    let (Some(first), Some((_, domain))) = (input.email.chars().next(), input.email.split_once('@')) else {
        return Err(Failure::fail("BadAddress", "the e-mail address has no @"));
    };
    let (whole, cents) = (input.amount_cents / 100, input.amount_cents % 100);
    Ok(ReceiptSent {
        receipt: format!("R-{}", number(&input.order_id)),
        to: format!("{first}***@{domain}"),
        amount: format!("{whole}.{cents:02} {}", input.currency),
    })
}

/// Input of `update_loyalty`.
#[derive(Debug, Deserialize)]
pub struct Award {
    /// The customer's standing.
    pub tier: Tier,
    /// Points before.
    pub points: u64,
    /// What counts.
    pub net_cents: u64,
    /// Under review no points are awarded.
    pub decision: Decision,
}

/// Output of `update_loyalty`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Awarded {
    /// Points of this order.
    pub earned: u64,
    /// Points after it.
    pub balance: u64,
}

/// Awards loyalty points.
pub fn award(input: &Award) -> Result<Awarded, Failure> {
    let percent = match input.tier {
        Tier::Basic => 100,
        Tier::Silver => 150,
        Tier::Gold => 200,
    };
    let earned = match input.decision {
        Decision::Approve => input.net_cents * percent / 10_000,
        Decision::Review => 0,
    };
    Ok(Awarded { earned, balance: input.points + earned })
}

/// Input of `close`.
#[derive(Debug, Deserialize)]
pub struct Close {
    /// The order's id.
    pub order_id: String,
    /// The order's currency.
    pub currency: String,
    /// Sum of all lines.
    pub subtotal_cents: u64,
    /// Output of `price`.
    pub price: Quoted,
    /// Of the fraud check.
    pub decision: Decision,
    /// The payment.
    pub payment_id: String,
    /// Output of `ship`.
    pub shipment: Shipped,
    /// Output of `send_receipt`.
    pub receipt: ReceiptSent,
    /// Output of `update_loyalty`.
    pub loyalty: Awarded,
}

/// Gathers what the order came to.
pub fn close(input: &Close) -> Result<Closed, Failure> {
    let status = match input.decision {
        Decision::Approve => "completed",
        Decision::Review => "completed_after_review",
    };
    Ok(Closed {
        order_id: input.order_id.clone(),
        status: status.to_owned(),
        currency: input.currency.clone(),
        subtotal_cents: input.subtotal_cents,
        discount_cents: input.price.discount_cents,
        tax_cents: input.price.tax_cents,
        shipping_cents: input.price.shipping_cents,
        total_cents: input.price.total_cents,
        payment_id: input.payment_id.clone(),
        tracking: input.shipment.tracking.clone(),
        parcels: input.shipment.parcels,
        receipt: input.receipt.receipt.clone(),
        points_balance: input.loyalty.balance,
    })
}
