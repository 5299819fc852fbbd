//! The order workflow of the demo: the template, 24 orders, the handlers, and
//! what each order must come to.
//!
//! Plain functions and data; it knows nothing of workers, queues or databases.
//! `README.md` states the rules that [`handlers`] and [`expected`] follow
//! independently of each other.

pub mod expected;
pub mod handlers;

use serde::{Deserialize, Serialize};

/// The template, as YAML.
pub const TEMPLATE: &str = include_str!("../order.yaml");

/// The orders, as a JSON list of [`Order`].
pub const ORDERS: &str = include_str!("../orders.json");

/// The orders of the demo, in file order.
pub fn orders() -> Vec<Order> {
    serde_json::from_str(ORDERS).expect("a test reads orders.json")
}

/// One order: the input of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// `ORD-` and four digits.
    pub order_id: String,
    /// Who ordered.
    pub customer: Customer,
    /// ISO code of the country of the payer.
    pub billing_country: String,
    /// ISO code of the country the goods go to.
    pub shipping_country: String,
    /// ISO code; all amounts are whole cents of it.
    pub currency: String,
    /// What was ordered.
    pub items: Vec<Item>,
    /// A coupon's code.
    pub coupon: Option<String>,
    /// How the goods travel.
    pub shipping_method: ShippingMethod,
}

/// Who ordered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Customer {
    /// The customer's number.
    pub id: String,
    /// Full name.
    pub name: String,
    /// Address for the receipt.
    pub email: String,
    /// Standing in the loyalty programme.
    pub tier: Tier,
    /// Loyalty points before this order.
    pub points: u64,
    /// Whether this is the customer's first order.
    pub first_order: bool,
}

/// One item of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Stock keeping unit, once per order.
    pub sku: String,
    /// For people.
    pub name: String,
    /// 1 to 999.
    pub quantity: u64,
    /// Price of one.
    pub unit_price_cents: u64,
    /// Weight of one.
    pub weight_grams: u64,
}

/// How the goods travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShippingMethod {
    /// Base 499 cents.
    Standard,
    /// Base 1299 cents.
    Express,
    /// Collected by the customer.
    Pickup,
}

/// Standing in the loyalty programme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// One point per unit of currency.
    Basic,
    /// One and a half.
    Silver,
    /// Two.
    Gold,
}

/// The result of a finished order: the output of the step `close`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// The order's id.
    pub order_id: String,
    /// `completed` or `completed_after_review`.
    pub status: String,
    /// The order's currency.
    pub currency: String,
    /// Sum of all lines.
    pub subtotal_cents: u64,
    /// What the coupon took off.
    pub discount_cents: u64,
    /// Tax on subtotal less discount.
    pub tax_cents: u64,
    /// Untaxed.
    pub shipping_cents: u64,
    /// What was charged.
    pub total_cents: u64,
    /// The payment.
    pub payment_id: String,
    /// None for pickup.
    pub tracking: Option<String>,
    /// At least 1.
    pub parcels: u64,
    /// The receipt's number.
    pub receipt: String,
    /// Loyalty points after this order.
    pub points_balance: u64,
}
