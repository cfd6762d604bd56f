//! One line a step: what is asked of the shelf, and what comes of it.

use super::*;

#[derive(Debug, PartialEq)]
struct Server {
    number: u32,
    kind: char,
}

impl Shelved for Server {
    type Kind = char;
    fn kind(&self) -> &char {
        &self.kind
    }
}

fn server(number: u32, kind: char) -> Server {
    Server { number, kind }
}

/// So many more servers the upstream has room for.
struct Upstream(usize, bool);

impl Rooms for Upstream {
    type Room = ();
    fn open(&mut self) -> Option<()> {
        self.0 = self.0.checked_sub(1)?;
        Some(())
    }
    fn replace(&mut self) -> Option<()> {
        Some(())
    }
    fn is_full(&self) -> bool {
        self.1
    }
}

fn check(size: usize, steps: &[(&str, &str)]) {
    let bounds = Bounds { size, reserve: 0 };
    check_with(bounds, 1000, steps);
}

/// One line a step: `take client kind`, `put number kind owner`, `closed`, `offer` and so on, and what came of it.
fn check_with(bounds: Bounds, room: usize, steps: &[(&str, &str)]) {
    let mut shelf: Shelf<Server, String> = Shelf::new(bounds, false);
    let mut rooms = Upstream(room, false);
    let now = Instant::now();
    let offered = |offer: Offer<Server, String, ()>| match offer {
        Offer::Nothing => "nothing".to_owned(),
        Offer::Starved => "starved".to_owned(),
        Offer::Full => "full".to_owned(),
        Offer::Idle(server, waiter) => format!("idle {} to {waiter}", server.number),
        Offer::Slot(waiter, (), old) => {
            format!("slot to {waiter}, close {:?}", old.map(|s| s.number))
        }
    };
    for (step, expected) in steps {
        let words: Vec<_> = step.split(' ').collect();
        let kind = |at: usize| words[at].chars().next().unwrap();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let outcome = match words[0] {
            "take" => {
                let client = number(1) as u64;
                let wake = || format!("client {client}");
                let mut rank = Rank::default();
                for named in words.iter().skip(3) {
                    let known = Worth::ALL.into_iter().find(|worth| worth.name() == *named);
                    match known {
                        Some(worth) => rank.worth = worth,
                        None => rank.priority = Priority::of_word(named).unwrap(),
                    }
                }
                let asker = Asker {
                    client,
                    kind: &kind(2),
                    rank,
                    since: now,
                    ticket: None,
                };
                match shelf.take(&asker, &mut rooms, wake) {
                    Take::Ready(server) => format!("ready {}", server.number),
                    Take::Open(()) => "open".into(),
                    Take::Replace(server, ()) => format!("replace {}", server.number),
                    Take::Wait { ticket, lack } => match lack {
                        Lack::Server => format!("wait {ticket}"),
                        Lack::Room => format!("starve {ticket}"),
                        Lack::Turn => format!("turn {ticket}"),
                    },
                }
            }
            "put" => {
                let owner = words.get(3).map(|owner| owner.parse().unwrap());
                match shelf.put(server(number(1) as u32, kind(2)), owner, !rooms.1) {
                    Put::Kept => "kept".into(),
                    Put::Hand(server, waiter) => format!("{} to {waiter}", server.number),
                    Put::Close(server) => format!("close {}", server.number),
                }
            }
            "forget" => {
                shelf.forget(number(1) as u64);
                String::new()
            }
            "full" => {
                rooms.1 = words[1] == "on";
                String::new()
            }
            "disown" => {
                shelf.disown(number(1) as u64);
                String::new()
            }
            "closed" => {
                shelf.closed();
                offered(shelf.offer(&mut rooms))
            }
            "offer" => offered(shelf.offer(&mut rooms)),
            "room" => {
                rooms.0 += 1;
                offered(shelf.offer(&mut rooms))
            }
            "claim" => offered(shelf.claim_reserve(number(1) as u64, &mut rooms)),
            "keep" => {
                let room = shelf.reserve_slot(number(1), &mut rooms);
                room.map_or("no", |()| "open").into()
            }
            "pause" => {
                shelf.pause(true);
                String::new()
            }
            "resume" => {
                shelf.pause(false);
                offered(shelf.offer(&mut rooms))
            }
            "resize" => {
                let reserve = shelf.bounds().reserve;
                let closed = shelf.resize(Bounds {
                    size: number(1),
                    reserve,
                });
                format!(
                    "close {:?}",
                    closed.iter().map(|s| s.number).collect::<Vec<_>>()
                )
            }
            other => panic!("{other}"),
        };
        assert_eq!(&outcome, expected, "{step}");
    }
}

#[test]
fn a_client_gets_its_own_server_back() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "open"),
        ("put 10 a 1", "kept"),
        ("put 20 a 2", "kept"),
        ("take 1 a", "ready 10"),
        ("take 2 a", "ready 20"),
    ];
    check(5, &steps);
}

#[test]
fn a_new_client_takes_over_a_server_of_one_that_left_before_opening_another() {
    let steps = [
        ("take 1 a", "open"),
        ("put 10 a 1", "kept"),
        ("take 2 a", "open"),
        ("put 20 a 2", "kept"),
        ("disown 1", ""),
        ("take 3 a", "ready 10"),
    ];
    check(5, &steps);
}

#[test]
fn servers_are_shared_only_when_no_more_may_be_opened() {
    let steps = [
        ("take 1 a", "open"),
        ("put 10 a 1", "kept"),
        ("take 2 a", "ready 10"),
        ("take 1 a", "wait 0"),
        ("take 3 a", "wait 1"),
        ("put 10 a 2", "10 to client 1"),
        ("put 10 a 1", "10 to client 3"),
        ("put 10 a 3", "kept"),
    ];
    check(1, &steps);
}

#[test]
fn a_server_opened_otherwise_is_replaced() {
    let steps = [
        ("take 1 a", "open"),
        ("put 10 a 1", "kept"),
        ("take 2 b", "replace 10"),
        ("take 1 a", "wait 0"),
        ("put 20 b 2", "close 20"),
        ("closed", "slot to client 1, close None"),
        ("put 11 a 1", "kept"),
        ("take 3 a", "ready 11"),
    ];
    check(1, &steps);
}

#[test]
fn a_waiter_that_gave_up_gets_nothing() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "wait 0"),
        ("take 3 a", "wait 1"),
        ("forget 0", ""),
        ("closed", "slot to client 3, close None"),
    ];
    check(1, &steps);
}

#[test]
fn room_at_the_upstream_goes_to_whoever_waited_for_it_first() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "starve 0"),
        ("offer", "starved"),
        ("room", "slot to client 2, close None"),
        ("take 3 a", "starve 1"),
        ("put 10 a 1", "10 to client 3"),
        ("put 10 a 3", "kept"),
        ("take 4 a", "starve 2"),
    ];
    // Client 4 finds 10 idle, though client 3's: better than to wait.
    let last = steps.len() - 1;
    check_with(
        Bounds {
            size: 3,
            reserve: 0,
        },
        1,
        &[&steps[..last], &[("take 4 a", "ready 10")]].concat(),
    );
}

#[test]
fn a_newcomer_does_not_take_the_room_others_wait_for() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "starve 0"),
        ("take 3 a", "starve 1"),
        ("room", "slot to client 2, close None"),
        ("room", "slot to client 3, close None"),
    ];
    check_with(
        Bounds {
            size: 5,
            reserve: 0,
        },
        1,
        &steps,
    );
}

#[test]
fn the_reserve_is_for_the_patient_and_closed_once_nobody_waits() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "wait 0"),
        ("take 3 a", "wait 1"),
        ("claim 0", "slot to client 2, close None"),
        ("claim 1", "nothing"),
        ("claim 0", "nothing"),
        ("put 10 a 1", "10 to client 3"),
        ("put 20 a 2", "close 20"),
        ("closed", "nothing"),
        ("put 10 a 3", "kept"),
    ];
    check_with(
        Bounds {
            size: 1,
            reserve: 1,
        },
        9,
        &steps,
    );
}

#[test]
fn a_paused_pool_lends_nothing_and_keeps_nothing() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "open"),
        ("put 20 a 2", "kept"),
        ("pause", ""),
        ("take 3 a", "wait 0"),
        ("put 10 a 1", "close 10"),
        ("closed", "nothing"),
        ("keep 2", "no"),
        ("resume", "idle 20 to client 3"),
    ];
    check(2, &steps);
}

#[test]
fn a_smaller_pool_closes_what_is_too_many() {
    let steps = [
        ("take 1 a", "open"),
        ("take 2 a", "open"),
        ("take 3 a", "open"),
        ("put 30 a 3", "kept"),
        ("resize 1", "close [30]"),
        ("closed", "nothing"),
        ("take 3 a", "wait 0"),
        ("put 20 a 2", "close 20"),
        ("closed", "nothing"),
        ("put 10 a 1", "10 to client 3"),
        ("resize 2", "close []"),
        ("take 1 a", "open"),
    ];
    check(3, &steps);
}

#[test]
fn servers_are_kept_ready_up_to_the_size() {
    let steps = [
        ("keep 3", "open"),
        ("put 10 a", "kept"),
        ("keep 1", "no"),
        ("keep 3", "open"),
        ("keep 3", "no"),
    ];
    check(2, &steps);
}

#[test]
fn a_priority_counts_for_more_than_what_is_asked() {
    check(
        1,
        &[
            ("take 1 a", "open"),
            ("take 2 a progress low", "wait 0"),
            ("take 3 a read", "wait 1"),
            ("take 4 a progress", "wait 2"),
            ("take 5 a read high", "wait 3"),
            ("put 1 a", "1 to client 5"),
            ("put 1 a", "1 to client 4"),
            ("put 1 a", "1 to client 3"),
            ("put 1 a", "1 to client 2"),
        ],
    );
    let rank = |priority, worth| Rank { priority, worth };
    let gives_way: Vec<_> = Priority::ALL
        .into_iter()
        .flat_map(|priority| Worth::ALL.map(|worth| rank(priority, worth)))
        .filter(|rank| rank.gives_way())
        .collect();
    assert_eq!(
        gives_way,
        [
            rank(Priority::Low, Worth::Read),
            rank(Priority::Low, Worth::Start),
            rank(Priority::Low, Worth::Other),
            rank(Priority::Normal, Worth::Read),
        ]
    );
}

#[test]
fn who_is_worth_more_is_served_first_and_nobody_waits_for_ever() {
    check(
        1,
        &[
            ("take 1 a", "open"),
            ("take 2 a read", "wait 0"),
            ("take 3 a other", "wait 1"),
            ("take 4 a progress", "wait 2"),
            ("take 5 a other", "wait 3"),
            ("take 6 a progress", "wait 4"),
            ("take 7 a start", "wait 5"),
            ("put 1 a", "1 to client 4"),
            ("put 1 a", "1 to client 6"),
            ("put 1 a", "1 to client 3"),
            ("take 8 a progress", "wait 6"),
            ("put 1 a", "1 to client 8"),
            ("take 9 a progress", "wait 7"),
            ("put 1 a", "1 to client 9"),
            ("take 10 a progress", "wait 8"),
            ("put 1 a", "1 to client 10"),
            ("take 11 a progress", "wait 9"),
            ("put 1 a", "1 to client 11"),
            // The eighth is for whoever has waited longest.
            ("take 12 a progress", "wait 10"),
            ("put 1 a", "1 to client 2"),
            ("put 1 a", "1 to client 12"),
            ("put 1 a", "1 to client 5"),
            ("put 1 a", "1 to client 7"),
            ("put 1 a", "kept"),
        ],
    );
}

#[test]
fn too_much_is_more_than_a_burst_and_so_is_what_passes_by() {
    let bounds = Bounds {
        size: 1,
        reserve: 0,
    };
    let mut shelf: Shelf<Server, u64> = Shelf::new(bounds, false);
    let (mut rooms, now) = (Upstream(1, false), Instant::now());
    let mut come = |shelf: &mut Shelf<Server, u64>, client| {
        let asker = Asker {
            client,
            kind: &'a',
            rank: Rank::default(),
            since: now,
            ticket: None,
        };
        shelf.take(&asker, &mut rooms, || client)
    };
    assert!(matches!(come(&mut shelf, 0), Take::Open(())));
    for client in 1..=32 {
        assert!(matches!(come(&mut shelf, client), Take::Wait { .. }));
    }
    let granted = shelf.granted();
    assert!(!shelf.is_overloaded());
    assert!(!shelf.is_passing_by(granted));
    come(&mut shelf, 33);
    assert!(shelf.is_overloaded() && shelf.is_passing_by(granted));
    shelf.pause(true);
    assert!(!shelf.is_overloaded() && !shelf.is_passing_by(granted));
    shelf.pause(false);
    // Served one by one, none comes: what has passed and what is left are one burst.
    for left in (0..33).rev() {
        assert!(matches!(
            shelf.put(server(1, 'a'), None, true),
            Put::Hand(..)
        ));
        assert_eq!(shelf.is_passing_by(granted), left > 2, "{left} left");
    }
    assert!(!shelf.is_overloaded());
    assert!(!shelf.is_passing_by(shelf.granted()));
}

#[test]
fn idle_servers_stay_idle_while_as_many_are_at_work_as_may_be() {
    check(
        2,
        &[
            ("take 1 a", "open"),
            ("take 2 a", "open"),
            ("full on", ""),
            ("take 3 a", "turn 0"),
            ("put 1 a", "kept"),
            ("offer", "full"),
            ("claim 0", "nothing"),
            ("take 4 a progress", "turn 1"),
            ("full off", ""),
            ("offer", "idle 1 to client 4"),
            ("offer", "nothing"),
            ("put 2 a", "2 to client 3"),
            ("full on", ""),
            ("put 1 a", "kept"),
            ("take 5 b", "turn 2"),
            ("full off", ""),
            ("offer", "slot to client 5, close Some(1)"),
        ],
    );
}
