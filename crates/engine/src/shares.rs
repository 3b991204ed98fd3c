//! [`Shares`]: how much of the engine each client has had, for deficit round robin (Shreedhar and Varghese 1995, with the
//! order within a round left to the caller as in DLPM, arXiv 2501.14312).
//!
//! A client is active while it has a request here. It pays for uncached prompt tokens and twice for output tokens, since
//! a token written takes longer than one read; clients in debt wait while another one that waits is not. Who becomes
//! active starts level with whoever has had least: being away earns nothing.

use std::collections::BTreeMap;
use types::ClientId;

/// What a client gets a round, in tokens: one large slice of a prompt, so that rounds do not chop prompts.
const QUANTUM: i64 = 2048;
/// Price of a token written, in tokens read.
const OUTPUT_PRICE: i64 = 2;

#[derive(Debug, Default)]
struct Account {
    /// Tokens that it may still take in this round; negative: a debt.
    deficit: i64,
    requests: u32,
}

/// The active clients' accounts.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    accounts: BTreeMap<ClientId, Account>,
}

impl Shares {
    /// A request of the client came.
    pub(crate) fn enter(&mut self, client: ClientId) {
        let level = self.accounts.values().map(|account| account.deficit).max().unwrap_or(QUANTUM);
        let level_account = || Account { deficit: level.min(QUANTUM), requests: 0 };
        self.accounts.entry(client).or_insert_with(level_account).requests += 1;
    }

    /// A request of the client ended.
    pub(crate) fn leave(&mut self, client: ClientId) {
        if let Some(account) = self.accounts.get_mut(&client) {
            account.requests -= 1;
            if account.requests == 0 {
                self.accounts.remove(&client);
            }
        }
    }

    /// The client had prompt tokens read that no cache had.
    pub(crate) fn charge_input(&mut self, client: ClientId, tokens: usize) {
        self.charge(client, tokens as i64);
    }

    /// The client had a token written.
    pub(crate) fn charge_output(&mut self, client: ClientId) {
        self.charge(client, OUTPUT_PRICE);
    }

    /// Begins as many rounds as it takes until one of the `waiting` clients is not in debt.
    pub(crate) fn refill(&mut self, waiting: impl Iterator<Item = ClientId>) {
        let best = waiting.filter_map(|client| Some(self.accounts.get(&client)?.deficit)).max();
        let Some(best) = best.filter(|&best| best <= 0) else { return };
        let rounds = -best / QUANTUM + 1;
        for account in self.accounts.values_mut() {
            account.deficit = (account.deficit + rounds * QUANTUM).min(QUANTUM);
        }
    }

    /// Whether the client may take something in this round.
    pub(crate) fn may_take(&self, client: ClientId) -> bool {
        self.accounts.get(&client).is_none_or(|account| account.deficit > 0)
    }

    /// Active clients.
    pub(crate) fn clients(&self) -> usize {
        self.accounts.len()
    }

    /// Requests of all clients that have not ended.
    pub(crate) fn requests(&self) -> u32 {
        self.accounts.values().map(|account| account.requests).sum()
    }

    fn charge(&mut self, client: ClientId, tokens: i64) {
        if let Some(account) = self.accounts.get_mut(&client) {
            account.deficit -= tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ClientId = ClientId(1);
    const B: ClientId = ClientId(2);

    #[test]
    fn who_was_away_gets_no_credit_and_who_took_waits() {
        let mut shares = Shares::default();
        shares.enter(A);
        shares.charge_input(A, 100_000);
        assert!(!shares.may_take(A));
        shares.enter(B);
        shares.refill([A, B].into_iter());
        assert!(shares.may_take(A) && shares.may_take(B), "both begin level: {shares:?}");
        shares.charge_input(A, 5000);
        shares.refill([A, B].into_iter());
        assert!(!shares.may_take(A) && shares.may_take(B), "{shares:?}");
        for _ in 0..2500 {
            shares.charge_output(B);
        }
        shares.refill([A, B].into_iter());
        assert!(shares.may_take(A) && shares.may_take(B), "2500 tokens written are 5000 read: {shares:?}");
    }

    #[test]
    fn nobody_waits_for_a_client_that_does_not() {
        let mut shares = Shares::default();
        shares.enter(A);
        shares.enter(B);
        shares.charge_input(A, 1_000_000);
        shares.refill([A].into_iter());
        assert!(shares.may_take(A), "B has credit but nothing to do: {shares:?}");
        shares.leave(A);
        shares.leave(B);
        assert_eq!((shares.clients(), shares.requests()), (0, 0));
    }
}
