//! What comes over a network or a pipe: prefaces and frames of every class. The first byte says which.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use wire::{
    Control, Decoder, EngineCommand, EngineReport, FrameClass, Hello, Reply, Request, encode, preface,
};

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 9 {
        0 => check::<Hello>(FrameClass::Hello, bytes),
        1 => check::<Control>(FrameClass::Control, bytes),
        2 => check::<Request>(FrameClass::Request, bytes),
        3 => check::<Reply>(FrameClass::Reply, bytes),
        4 => check::<Reply>(FrameClass::Embedded, bytes),
        5 => check::<Reply>(FrameClass::Assets, bytes),
        6 => check::<EngineCommand>(FrameClass::Engine, bytes),
        7 => check::<EngineReport>(FrameClass::Engine, bytes),
        _ => {
            if let Some(bytes) = bytes.first_chunk() {
                let fits = preface::check(*bytes).is_ok();
                assert_eq!(fits, *bytes == preface::preface());
            }
        }
    }
});

/// Messages read whole are those that are read byte by byte, and what is written of one reads as the same again.
fn check<T: Serialize + DeserializeOwned + Debug>(class: FrameClass, bytes: &[u8]) {
    let decoder = Decoder::<T>::new(class);
    let mut whole = BytesMut::from(bytes);
    let mut expected = Vec::new();
    while let Ok(Some(message)) = decoder.next(&mut whole) {
        let mut written = BytesMut::new();
        if encode(class, &message, &mut written).is_ok() {
            let first = written.clone();
            let again = decoder.next(&mut written).expect("it was just written").expect("all of it");
            assert!(written.is_empty());
            let mut second = BytesMut::new();
            encode(class, &again, &mut second).expect("it was written before");
            assert_eq!(first, second);
        }
        expected.push(format!("{message:?}"));
    }
    let mut pieces = BytesMut::new();
    let mut found = Vec::new();
    'bytes: for &byte in bytes {
        pieces.extend_from_slice(&[byte]);
        loop {
            match decoder.next(&mut pieces) {
                Ok(Some(message)) => found.push(format!("{message:?}")),
                Ok(None) => break,
                Err(_) => break 'bytes,
            }
        }
    }
    assert_eq!(found, expected);
}
