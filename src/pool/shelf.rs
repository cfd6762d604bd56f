//! The books of one pool: which servers are idle, how many are open, who waits. Synchronous, no I/O, no clock.
//! INVARIANT: `open` counts every server that exists or is being opened; waiters exist only while no server they could
//! use is idle. `checkout.rs` keeps it behind a lock that is never held over an await.

use std::collections::VecDeque;

/// What the shelf needs to know of a server.
pub(crate) trait Shelved {
    /// Servers are interchangeable among clients of an equal kind.
    type Kind: PartialEq + Clone;
    fn kind(&self) -> &Self::Kind;
}

/// A client, for affinity.
pub(crate) type ClientId = u64;

pub(crate) struct Shelf<S: Shelved, W> {
    idle: Vec<Idle<S>>,
    open: usize,
    size: usize,
    waiters: VecDeque<Waiter<S::Kind, W>>,
    next_ticket: u64,
}

struct Idle<S> {
    server: S,
    owner: Option<ClientId>,
}

struct Waiter<K, W> {
    ticket: u64,
    client: ClientId,
    kind: K,
    wake: W,
}

/// What a client that wants a server gets.
pub(crate) enum Take<S> {
    Ready(S),
    /// A slot is reserved: open a server, or give the slot back.
    Open,
    /// The same, after closing this one.
    Replace(S),
    /// Nothing free; the ticket takes the wish back.
    Wait(u64),
}

/// What becomes of a server or a slot that came free.
pub(crate) enum Give<S, W> {
    /// It is idle now, or the slot is free.
    Kept,
    /// Hand the server to this waiter.
    Server(S, W, ClientId),
    /// This waiter may open a server in its place; a server that did not fit is to be closed.
    Slot(W, Option<S>),
}

impl<S: Shelved, W> Shelf<S, W> {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            idle: Vec::new(),
            open: 0,
            size,
            waiters: VecDeque::new(),
            next_ticket: 0,
        }
    }

    /// A server that may be had at once and at nobody's cost: the client's own, or one that nobody owns.
    pub(crate) fn take_idle(&mut self, client: ClientId, kind: &S::Kind) -> Option<S> {
        let fits = |idle: &Idle<S>| idle.server.kind() == kind;
        let own = self
            .idle
            .iter()
            .position(|idle| idle.owner == Some(client) && fits(idle));
        let free = || {
            self.idle
                .iter()
                .rposition(|idle| idle.owner.is_none() && fits(idle))
        };
        own.or_else(free).map(|at| self.idle.remove(at).server)
    }

    /// Affinity first: the client's own server; then one nobody owns; then a new one; then the one idle longest.
    pub(crate) fn take(
        &mut self,
        client: ClientId,
        kind: &S::Kind,
        wake: impl FnOnce() -> W,
    ) -> Take<S> {
        if let Some(server) = self.take_idle(client, kind) {
            return Take::Ready(server);
        }
        let fits = |idle: &Idle<S>| idle.server.kind() == kind;
        if self.open < self.size {
            self.open += 1;
            return Take::Open;
        }
        // Idle servers stand in the order they came back, so the first that fits has been idle longest.
        if let Some(at) = self.idle.iter().position(fits) {
            return Take::Ready(self.idle.remove(at).server);
        }
        if !self.idle.is_empty() {
            return Take::Replace(self.idle.remove(0).server);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiters.push_back(Waiter {
            ticket,
            client,
            kind: kind.clone(),
            wake: wake(),
        });
        Take::Wait(ticket)
    }

    /// A server comes back clean; `owner` is the client it stays warm for.
    pub(crate) fn put(&mut self, server: S, owner: Option<ClientId>) -> Give<S, W> {
        match self.waiters.pop_front() {
            None => {
                self.idle.push(Idle { server, owner });
                Give::Kept
            }
            Some(waiter) if waiter.kind == *server.kind() => {
                Give::Server(server, waiter.wake, waiter.client)
            }
            Some(waiter) => Give::Slot(waiter.wake, Some(server)),
        }
    }

    /// A server was closed, or could not be opened.
    pub(crate) fn closed(&mut self) -> Give<S, W> {
        match self.waiters.pop_front() {
            None => {
                self.open -= 1;
                Give::Kept
            }
            Some(waiter) => Give::Slot(waiter.wake, None),
        }
    }

    /// The waiter with this ticket has given up.
    pub(crate) fn forget(&mut self, ticket: u64) {
        self.waiters.retain(|waiter| waiter.ticket != ticket);
    }

    /// This client is gone: its idle server is anybody's.
    pub(crate) fn disown(&mut self, client: ClientId) {
        self.idle
            .iter_mut()
            .filter(|idle| idle.owner == Some(client))
            .for_each(|idle| idle.owner = None);
    }

    /// Takes out every idle server `wanted` picks; each must be reported `closed`.
    pub(crate) fn remove_idle(&mut self, mut wanted: impl FnMut(&mut S) -> bool) -> Vec<S> {
        let mut removed = Vec::new();
        let mut at = 0;
        while let Some(idle) = self.idle.get_mut(at) {
            if wanted(&mut idle.server) {
                removed.push(self.idle.remove(at).server);
            } else {
                at += 1;
            }
        }
        removed
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            open: self.open,
            idle: self.idle.len(),
            waiting: self.waiters.len(),
        }
    }
}

/// How full a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) open: usize,
    pub(crate) idle: usize,
    pub(crate) waiting: usize,
}

#[cfg(test)]
mod tests {
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

    /// One line a step: `take client kind` or `put number kind owner` or `closed`, and what came of it.
    fn check(size: usize, steps: &[(&str, &str)]) {
        let mut shelf: Shelf<Server, String> = Shelf::new(size);
        for (step, expected) in steps {
            let words: Vec<_> = step.split(' ').collect();
            let kind = |at: usize| words[at].chars().next().unwrap();
            let outcome = match words[0] {
                "take" => match shelf.take(words[1].parse().unwrap(), &kind(2), || {
                    format!("client {}", words[1])
                }) {
                    Take::Ready(server) => format!("ready {}", server.number),
                    Take::Open => "open".into(),
                    Take::Replace(server) => format!("replace {}", server.number),
                    Take::Wait(ticket) => format!("wait {ticket}"),
                },
                "forget" => {
                    shelf.forget(words[1].parse().unwrap());
                    String::new()
                }
                "disown" => {
                    shelf.disown(words[1].parse().unwrap());
                    String::new()
                }
                _ => {
                    let give = if words[0] == "closed" {
                        shelf.closed()
                    } else {
                        shelf.put(
                            server(words[1].parse().unwrap(), kind(2)),
                            words.get(3).map(|o| o.parse().unwrap()),
                        )
                    };
                    match give {
                        Give::Kept => "kept".into(),
                        Give::Server(server, waiter, _) => format!("{} to {waiter}", server.number),
                        Give::Slot(waiter, closed) => {
                            format!("slot to {waiter}, close {:?}", closed.map(|s| s.number))
                        }
                    }
                }
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
            ("put 20 b 2", "slot to client 1, close Some(20)"),
            ("closed", "kept"),
            ("take 3 a", "open"),
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
}
