//! Places for connections: a bounded number, and where all are taken, the connection that has been waiting for its client the
//! longest gives its place up.
//!
//! [`Seats`] owns the places, a connection has a [`Seat`]; while a request of it is answered ([`Busy`]) nobody takes that away.
//! So whoever opens thousands of connections and says nothing, or a byte a second, keeps nobody else out.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub(crate) struct Seats {
    places: Arc<Semaphore>,
    idle: Mutex<Idle>,
    /// A connection has begun to wait.
    idle_again: Notify,
}

#[derive(Debug, Default)]
struct Idle {
    /// Counts up with each wait that begins.
    serial: u64,
    /// Whom to tell that it has to go, by when its wait began.
    waiting: BTreeMap<u64, Arc<Notify>>,
}

impl Seats {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        let (places, idle) = (Arc::new(Semaphore::new(count)), Mutex::default());
        Arc::new(Self { places, idle, idle_again: Notify::new() })
    }

    /// A place for one more connection, as soon as one can be had.
    pub(crate) async fn take(self: &Arc<Self>) -> Arc<Seat> {
        let place = loop {
            if let Ok(place) = self.places.clone().try_acquire_owned() {
                break place;
            }
            let acquire = async { self.places.clone().acquire_owned().await.expect("never closed") };
            let longest = self.idle().waiting.pop_first();
            if let Some((_, evict)) = longest {
                evict.notify_one();
                break acquire.await;
            }
            tokio::select! {
                place = acquire => break place,
                () = self.idle_again.notified() => {}
            }
        };
        let seat = Seat { seats: self.clone(), evict: Arc::default(), wait: Mutex::default(), _place: place };
        seat.begin_to_wait();
        Arc::new(seat)
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    evict: Arc<Notify>,
    /// The number of the wait that it is in.
    wait: Mutex<Option<u64>>,
    _place: OwnedSemaphorePermit,
}

impl Seat {
    /// Resolves when another connection needs the place.
    pub(crate) async fn needed_elsewhere(&self) {
        self.evict.notified().await;
    }

    /// A request has come.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.end_wait();
        Busy(self.clone())
    }

    fn begin_to_wait(&self) {
        let mut idle = self.seats.idle();
        idle.serial += 1;
        let serial = idle.serial;
        idle.waiting.insert(serial, self.evict.clone());
        *self.wait.lock().unwrap_or_else(PoisonError::into_inner) = Some(serial);
        drop(idle);
        self.seats.idle_again.notify_one();
    }

    fn end_wait(&self) {
        let mut idle = self.seats.idle();
        let wait = self.wait.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(serial) = wait {
            idle.waiting.remove(&serial);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.end_wait();
    }
}

/// A request that is being answered, until it is dropped.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Seat>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.begin_to_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_one_that_waits_longest_goes() {
        let seats = Seats::new(3);
        let (first, second, third) = (seats.take().await, seats.take().await, seats.take().await);
        // The first one has been answered since: the second one waits longest.
        drop(first.busy());
        let (fourth, ()) = tokio::join!(seats.take(), async {
            second.needed_elsewhere().await;
            drop(second);
        });
        assert!(timeout(SOON, first.needed_elsewhere()).await.is_err());
        let (_fifth, ()) = tokio::join!(seats.take(), async {
            third.needed_elsewhere().await;
            drop(third);
        });
        drop(fourth);
        assert!(timeout(SOON, first.needed_elsewhere()).await.is_err(), "there was room");
    }

    #[tokio::test(start_paused = true)]
    async fn whom_is_answered_stays_and_the_next_to_wait_goes() {
        let seats = Seats::new(2);
        let (one, two) = (seats.take().await, seats.take().await);
        let (busy_one, busy_two) = (one.busy(), two.busy());
        assert!(timeout(SOON, seats.take()).await.is_err(), "both are answered");
        let third = tokio::join!(seats.take(), async {
            tokio::time::sleep(SOON).await;
            drop(busy_two);
            two.needed_elsewhere().await;
            drop(two);
        });
        assert_eq!(seats.idle().waiting.len(), 1, "the third one");
        drop((third, busy_one, one));
        assert_eq!((seats.idle().waiting.len(), seats.places.available_permits()), (0, 2));
    }
}
