//! Random backlogs under random limits: what every pass of the admission keeps to.
//!
//! The limits and the hold groups are modelled here a second time, as the tables and functions of
//! migrations/0009 have them; what is sent, and in which order, is the code's.

use std::collections::BTreeSet;

use chrono::TimeDelta;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;

/// At most so many in flight at once.
const AT_ONCE: [(&str, i64); 2] = [("one", 1), ("two", 2)];
/// At most so many in each so many milliseconds, by a bucket that is refilled evenly.
const RATE: (&str, u64, u64) = ("rate", 3, 100);
const KEYS: [&str; 4] = ["", "a", "b", "c"];

#[derive(Debug, Clone)]
enum Act {
    /// So many become ready and are held, under the limits of these bits.
    Arrive { priority: i32, key: usize, limits: u8, count: u8 },
    /// Time passes, some of what is in flight ends, and there is room for so many.
    Pass { ms: u64, ends: u8, max: usize },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => (0..3_i32, 0..KEYS.len(), 0..8_u8, 1..9_u8)
            .prop_map(|(priority, key, limits, count)| Act::Arrive { priority, key, limits, count }),
        3 => (0..60_u64, any::<u8>(), 1..7_usize).prop_map(|(ms, ends, max)| Act::Pass { ms, ends, max }),
    ]
}

/// A queue, what waits for it and what is in flight.
#[derive(Default)]
struct Queue {
    ms: u64,
    made: u128,
    held: Vec<Candidate>,
    in_flight: Vec<Candidate>,
    /// When each of those that the rate is about was sent.
    began: Vec<u64>,
    /// What was taken out of the bucket and is not refilled yet, in hundredths of a token.
    spent: u64,
    turns: Turns,
    /// By priority and key: passes in which others of its priority had turns, and it could have had one.
    overtaken: HashMap<(i32, String), usize>,
}

impl Queue {
    fn arrive(&mut self, priority: i32, key: usize, limits: u8) {
        self.made += 1;
        let names = [AT_ONCE[0].0, AT_ONCE[1].0, RATE.0];
        let limits = names.iter().enumerate().filter(|(bit, _)| limits & (1 << bit) != 0);
        let plain = limits.clone().count() == 0 && KEYS[key].is_empty();
        self.held.push(Candidate {
            task: Uuid::from_u128(self.made),
            step: Uuid::from_u128(self.made),
            priority,
            fair: KEYS[key].to_owned(),
            ready_at: DateTime::UNIX_EPOCH + TimeDelta::milliseconds(i64::try_from(self.made).unwrap()),
            limits: limits.map(|(_, name)| (*name).to_owned()).collect(),
            quota: (!plain).then_some(0),
        });
    }

    fn pass_time(&mut self, ms: u64) {
        self.ms += ms;
        self.spent = self.spent.saturating_sub(refilled(ms));
    }

    /// `tasker.limit_use`.
    fn left(&self) -> Left {
        let used = |name: &str| self.in_flight.iter().filter(|step| step.limits.iter().any(|of| of == name)).count();
        let slots = AT_ONCE.iter().map(|(name, most)| (*name, Some(most - i64::try_from(used(name)).unwrap()), None));
        let hundredths = i32::try_from(RATE.1 * TOKEN - self.spent).unwrap();
        let tokens = (RATE.0, None, Some(f64::from(hundredths) / 100.0));
        let free = |(name, slots, tokens): (&str, _, _)| (name.to_owned(), Free { limit_id: 1, slots, tokens });
        slots.chain([tokens]).map(free).collect()
    }

    /// One pass, as `choose` makes it; answers how many were sent.
    fn pass(&mut self, max: usize) -> Result<usize, TestCaseError> {
        let mut limits = self.left();
        // `tasker.held_lanes` and `tasker.held_steps`.
        let name =
            |held: &Candidate| format!("{}{GROUP_SEPARATOR}h{GROUP_SEPARATOR}{}", held.fair, held.limits.join(","));
        let in_groups = self.held.iter().filter(|held| held.quota.is_some());
        let groups: BTreeSet<_> =
            in_groups.map(|held| (Reverse(held.priority), name(held), held.limits.clone())).collect();
        let groups = groups.into_iter().map(|(Reverse(priority), lane, limits)| (HoldGroup { priority, lane }, limits));
        let groups: Vec<(HoldGroup, Vec<String>)> = groups.collect();
        let mut plain: Vec<Candidate> = self.held.iter().filter(|held| held.quota.is_none()).cloned().collect();
        plain.sort_by_key(|held| (Reverse(held.priority), held.ready_at));
        plain.truncate(max);

        // `tasker.first_in_lanes`; what is held is in the order of its time.
        let quotas = quotas(&groups, &limits, max);
        let mut candidates = plain;
        for (index, quota) in quotas.iter().enumerate() {
            let group = &groups[quota.group].0;
            let waits =
                |held: &&Candidate| held.quota.is_some() && held.priority == group.priority && name(held) == group.lane;
            let first = self.held.iter().filter(waits).take(usize::try_from(quota.most).unwrap());
            candidates.extend(first.map(|held| Candidate { quota: Some(index), ..held.clone() }));
        }
        self.turns.note(self.held.iter().map(|held| (held.priority, held.fair.as_str())), true);
        let taken = take(candidates, &quotas, &mut limits, &mut self.turns, max);
        self.send(&taken.steps)?;
        self.check_turns(&taken, max)?;
        Ok(taken.steps.len())
    }

    fn send(&mut self, steps: &[Candidate]) -> TestCaseResult {
        for sent in steps {
            let index = self.held.iter().position(|held| held.step == sent.step);
            self.in_flight.push(self.held.remove(index.expect("a step is sent once")));
            if sent.limits.iter().any(|name| name == RATE.0) {
                self.spent += TOKEN;
                self.began.push(self.ms);
            }
        }
        for (name, most) in AT_ONCE {
            let used = self.in_flight.iter().filter(|step| step.limits.iter().any(|of| of == name)).count();
            prop_assert!(used <= usize::try_from(most).unwrap(), "{} of {} are in flight", used, name);
        }
        // In every window: a full bucket, and what is refilled while it lasts.
        for (first, from) in self.began.iter().enumerate() {
            for (last, to) in self.began.iter().enumerate().skip(first) {
                let began = u64::try_from(last - first + 1).unwrap();
                let most = RATE.1 * TOKEN + refilled(to - from);
                prop_assert!(began * TOKEN <= most, "{} began from {} to {} ms", began, from, to);
            }
        }
        Ok(())
    }

    fn check_turns(&mut self, taken: &Taken, max: usize) -> TestCaseResult {
        let limits = self.left();
        let could: Vec<&Candidate> = self.held.iter().filter(|held| left(&limits, &held.limits) > 0).collect();
        prop_assert!(taken.steps.len() <= max);
        prop_assert!(taken.more || could.is_empty(), "there is room, and {:?} wait", could);
        prop_assert!(could.is_empty() || !taken.steps.is_empty(), "nothing goes on");
        let turns = |priority: i32, fair: &str| {
            taken.steps.iter().filter(|step| (step.priority, step.fair.as_str()) == (priority, fair)).count()
        };
        let mut overtaken = HashMap::new();
        for held in could {
            for sent in &taken.steps {
                prop_assert!(sent.priority >= held.priority, "{:?} went before {:?}", sent, held);
                if sent.priority != held.priority {
                    continue;
                }
                let same_group = (&sent.fair, &sent.limits) == (&held.fair, &held.limits);
                prop_assert!(!same_group || sent.ready_at < held.ready_at, "{:?} went before {:?}", sent, held);
                let (others, own) = (turns(sent.priority, &sent.fair), turns(held.priority, &held.fair));
                prop_assert!(others <= own + 1, "{} had {} turns, {} had {}", sent.fair, others, held.fair, own);
            }
            let key = (held.priority, held.fair.clone());
            let before = self.overtaken.get(&key).copied().unwrap_or_default();
            let of_others = taken.steps.iter().any(|sent| sent.priority == held.priority);
            if turns(held.priority, &held.fair) == 0 {
                overtaken.insert(key, before + usize::from(of_others));
            }
        }
        for (key, passes) in &overtaken {
            prop_assert!(*passes < KEYS.len(), "{:?} starves", key);
        }
        self.overtaken = overtaken;
        Ok(())
    }
}

/// In whole numbers, so that nothing is lost by rounding: hundredths of a token.
const TOKEN: u64 = 100;

fn refilled(ms: u64) -> u64 {
    ms * RATE.1 * TOKEN / RATE.2
}

proptest! {
    #[test]
    fn limits_hold_the_urgent_go_first_keys_take_turns_and_nothing_is_left(acts in prop::collection::vec(act(), 1..80)) {
        let mut queue = Queue::default();
        for act in acts {
            match act {
                Act::Arrive { priority, key, limits, count } => {
                    (0..count).for_each(|_| queue.arrive(priority, key, limits));
                }
                Act::Pass { ms, ends, max } => {
                    queue.pass_time(ms);
                    let mut bits = (0..8).cycle().map(|bit| ends & (1 << bit) == 0);
                    queue.in_flight.retain(|_| bits.next().unwrap_or(true));
                    queue.pass(max)?;
                }
            }
        }
        // When all that is in flight ends, everything has had its turn in the end.
        while !queue.held.is_empty() {
            queue.in_flight.clear();
            queue.pass_time(RATE.2);
            prop_assert!(queue.pass(4)? > 0, "{:?} wait for ever", queue.held);
        }
    }
}
