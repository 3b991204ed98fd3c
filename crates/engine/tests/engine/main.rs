//! The engine against a model without weights, in virtual time: what a request may meet, who runs when, and random traffic.

mod cache;
mod fairness;
mod guesses;
mod harness;
mod life;
mod pipeline;
mod random;
mod rules;
mod schedule;
