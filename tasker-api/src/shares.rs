//! So much of something for all together, and so much of it for each: what one takes too much of is
//! refused to that one, and nobody waits.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tasker_shared::metrics::{OfReason, metrics};

use crate::problem::{Code, OVERLOADED, Problem, RATE_LIMITED};

/// What is shared, and what has been taken of it.
#[derive(Debug)]
pub(crate) struct Shares<K> {
    all: usize,
    each: usize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    each: HashMap<K, usize>,
}

/// Why there is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// This one has taken its part.
    Each,
    /// All together have taken all of it.
    All,
}

/// What somebody has taken, until this is dropped.
#[derive(Debug)]
pub(crate) struct Share<K: Hash + Eq> {
    of: Arc<Shares<K>>,
    who: K,
    amount: usize,
}

impl<K: Hash + Eq + Clone> Shares<K> {
    /// So much for all together, and at most so much for each.
    pub(crate) fn new(all: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { all, each, taken: Mutex::new(Taken { all: 0, each: HashMap::new() }) })
    }

    /// Nothing yet: it grows.
    pub(crate) fn none(self: &Arc<Self>, who: K) -> Share<K> {
        Share { of: Arc::clone(self), who, amount: 0 }
    }

    /// Takes one.
    pub(crate) fn one(self: &Arc<Self>, who: K) -> Result<Share<K>, Full> {
        let mut share = self.none(who);
        share.grow(1)?;
        Ok(share)
    }
}

impl<K> Shares<K> {
    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq + Clone> Share<K> {
    /// Takes so much more, or nothing.
    pub(crate) fn grow(&mut self, more: usize) -> Result<(), Full> {
        let mut taken = self.of.taken();
        if more > self.of.all.saturating_sub(taken.all) {
            return Err(Full::All);
        }
        let own = taken.each.get(&self.who).copied().unwrap_or(0);
        if more > self.of.each.saturating_sub(own) {
            return Err(Full::Each);
        }
        taken.all += more;
        taken.each.insert(self.who.clone(), own + more);
        self.amount += more;
        Ok(())
    }
}

impl<K: Hash + Eq> Drop for Share<K> {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        taken.all -= self.amount;
        if let Some(own) = taken.each.get_mut(&self.who) {
            *own -= self.amount;
            if *own == 0 {
                taken.each.remove(&self.who);
            }
        }
    }
}

/// What requests share.
#[derive(Debug)]
pub(crate) struct Room {
    /// Connections, by address.
    pub(crate) connections: Arc<Shares<IpAddr>>,
    /// Event streams, by key.
    pub(crate) streams: Arc<Shares<String>>,
    /// Bytes of bodies, by key.
    pub(crate) bodies: Arc<Shares<String>>,
}

/// How a refusal is counted and told.
struct Refusal {
    reason: &'static str,
    code: Code,
    detail: &'static str,
}

/// Counts a connection that is refused, and says why.
pub(crate) fn no_connection(full: Full) -> Problem {
    refuse(match full {
        Full::Each => Refusal {
            reason: "address_connections",
            code: RATE_LIMITED,
            detail: "this address has too many connections open: use them again, or close some",
        },
        Full::All => Refusal {
            reason: "connections",
            code: OVERLOADED,
            detail: "this server has too many connections open; try again in a moment",
        },
    })
}

/// Counts an event stream that is refused, and says why.
pub(crate) fn no_stream(full: Full) -> Problem {
    refuse(match full {
        Full::Each => Refusal {
            reason: "key_streams",
            code: RATE_LIMITED,
            detail: "this key has too many event streams open: close some, or use another key",
        },
        Full::All => Refusal {
            reason: "streams",
            code: OVERLOADED,
            detail: "this server has too many event streams open; try again in a moment, or ask for lists meanwhile",
        },
    })
}

/// Counts a body that is refused, and says why.
pub(crate) fn no_body(full: Full) -> Problem {
    refuse(match full {
        Full::Each => Refusal {
            reason: "key_bodies",
            code: RATE_LIMITED,
            detail: "this key sends too many large bodies at once: send fewer, or smaller ones",
        },
        Full::All => Refusal {
            reason: "bodies",
            code: OVERLOADED,
            detail: "this server reads too many large bodies now; try again in a moment",
        },
    })
}

fn refuse(Refusal { reason, code, detail }: Refusal) -> Problem {
    metrics().http_refused.of(&OfReason { reason }).inc();
    code.because(detail).retry_after(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_takes_much_leaves_room_for_others_and_gives_all_of_it_back() {
        let shares = Shares::new(10, 6);
        let mut greedy = shares.none("greedy");
        greedy.grow(6).expect("its part");
        assert_eq!(greedy.grow(1), Err(Full::Each));
        let mut other = shares.none("other");
        other.grow(4).expect("what is left");
        assert_eq!(other.grow(1), Err(Full::All));
        assert_eq!(shares.one("third").map(drop), Err(Full::All));
        drop(greedy);
        other.grow(2).expect("what was given back");
        drop(other);
        let taken = shares.taken();
        assert_eq!((taken.all, taken.each.len()), (0, 0), "nobody is remembered who has nothing");
    }
}
