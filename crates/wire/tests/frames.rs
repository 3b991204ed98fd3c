//! Every message survives its frame, and nothing else does: garbage, cut, oversize and foreign frames are errors.

mod messages;

use bytes::BytesMut;
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use types::ModelAssets;
use wire::{
    CodecError, Control, Decoder, EngineCommand, EngineReport, FrameClass, FrameError, HEADER_BYTES, Hello,
    Reply, Request, encode,
};

fn frame<T: Serialize>(class: FrameClass, message: &T) -> BytesMut {
    let mut buffer = BytesMut::new();
    encode(class, message, &mut buffer).expect("fits");
    buffer
}

/// Two frames, one after the other, in pieces of `piece` bytes; then every cut of the first is "more bytes needed".
fn check_round_trip<T>(class: FrameClass, message: &T, piece: usize)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut sent = frame(class, message);
    let one = sent.len();
    encode(class, message, &mut sent).expect("fits");
    let decoder = Decoder::<T>::new(class);
    let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
    for bytes in sent.chunks(piece) {
        buffer.extend_from_slice(bytes);
        while let Some(message) = decoder.next(&mut buffer).expect("valid") {
            seen.push(message);
        }
    }
    assert_eq!(decoder.finish(&buffer), Ok(()));
    assert_eq!(seen.iter().collect::<Vec<_>>(), [message, message]);

    for cut in (1..one).step_by(1 + one / 64) {
        let mut buffer = BytesMut::from(&sent[..cut]);
        assert_eq!(decoder.next(&mut buffer), Ok(None));
        assert_eq!(decoder.finish(&buffer), Err(FrameError::Truncated { bytes: cut }));
    }
}

/// A payload that is shorter or longer than its message, in a frame of the right length.
fn check_ill_fitting<T>(class: FrameClass, message: &T)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let payload = frame(class, message).split_off(HEADER_BYTES);
    let read = |payload: &[u8]| {
        let mut buffer = BytesMut::from(&(payload.len() as u32).to_le_bytes()[..]);
        buffer.extend_from_slice(payload);
        Decoder::<T>::new(class).next(&mut buffer)
    };
    for cut in (0..payload.len()).step_by(1 + payload.len() / 64) {
        let error = read(&payload[..cut]).expect_err("a message's beginning is no message");
        assert!(
            matches!(error, FrameError::Codec(CodecError::Decode { bytes, .. }) if bytes == cut),
            "{error}"
        );
    }
    let mut long = payload.to_vec();
    long.push(0);
    let trailing = CodecError::Trailing { bytes: long.len(), excess: 1 };
    assert_eq!(read(&long), Err(FrameError::Codec(trailing)));
}

/// A frame with one byte changed: an error, or a message like any other.
fn check_changed<T>(class: FrameClass, message: &T, at: prop::sample::Index, to: u8)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut buffer = frame(class, message);
    let at = at.index(buffer.len());
    buffer[at] = to;
    if let Ok(Some(message)) = Decoder::<T>::new(class).next(&mut buffer) {
        // NaN is not equal to itself, but its bytes are.
        let again = frame(class, &message);
        let mut copy = again.clone();
        let decoded = Decoder::<T>::new(class).next(&mut copy).expect("just encoded").expect("whole");
        assert_eq!(frame(class, &decoded), again);
    }
}

/// Bytes that nobody meant, with an honest length before them or not: no panic and no endless buffering.
fn check_garbage<T: DeserializeOwned>(class: FrameClass, bytes: &[u8], honest: bool) {
    let mut buffer = BytesMut::new();
    if honest {
        buffer.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    }
    buffer.extend_from_slice(bytes);
    let before = buffer.len();
    match Decoder::<T>::new(class).next(&mut buffer) {
        Ok(Some(_)) => assert!(buffer.len() < before),
        Ok(None) => assert!(!honest && (before < HEADER_BYTES || before < HEADER_BYTES + class.bytes_max())),
        Err(FrameError::TooLarge { bytes, .. }) => assert!(bytes > class.bytes_max()),
        Err(_) => assert!(before >= HEADER_BYTES),
    }
}

macro_rules! check_messages {
    ($($name:ident: $type:ty, $class:ident;)*) => {
        mod round_trip {
            use super::*;
            proptest! {
                #![proptest_config(ProptestConfig::with_cases(64))]
                $(#[test]
                fn $name(message in messages::$name(), piece in 1usize..200) {
                    check_round_trip::<$type>(FrameClass::$class, &message, piece);
                    check_ill_fitting::<$type>(FrameClass::$class, &message);
                })*
            }
        }

        mod garbage {
            use super::*;
            proptest! {
                $(#[test]
                fn $name(
                    bytes in prop::collection::vec(any::<u8>(), 0..300), honest in any::<bool>(),
                    message in messages::$name(), at in any::<prop::sample::Index>(), to in any::<u8>(),
                ) {
                    check_garbage::<$type>(FrameClass::$class, &bytes, honest);
                    check_changed::<$type>(FrameClass::$class, &message, at, to);
                })*
            }
        }
    };
}

check_messages! {
    hello: Hello, Hello;
    control: Control, Control;
    request: Request, Request;
    reply: Reply, Reply;
    assets: Reply, Assets;
    engine_command: EngineCommand, Engine;
    engine_report: EngineReport, Engine;
}

#[test]
fn oversize_is_refused_in_both_directions_before_any_byte_of_it_is_kept() {
    for class in [
        FrameClass::Hello,
        FrameClass::Control,
        FrameClass::Request,
        FrameClass::Reply,
        FrameClass::Embedded,
        FrameClass::Assets,
        FrameClass::Engine,
    ] {
        let bytes = class.bytes_max() + 1;
        let mut buffer = BytesMut::from(&(bytes as u32).to_le_bytes()[..]);
        let error = Decoder::<Reply>::new(class).next(&mut buffer).expect_err("too large");
        assert_eq!(error, FrameError::TooLarge { class, bytes });
    }
    let reason = "x".repeat(FrameClass::Hello.bytes_max());
    let large = EngineReport::Failed { message: reason };
    let mut buffer = BytesMut::from(&b"before"[..]);
    let error = encode(FrameClass::Hello, &large, &mut buffer).expect_err("too large").to_string();
    assert_eq!(error, "a Hello frame of 16388 bytes; at most 16384 are allowed");
    assert_eq!(&buffer[..], b"before");
}

/// Lengths that the bytes cannot keep: a text of 60 MB and a list of four billion tokens, in a dozen bytes.
#[test]
fn a_promised_length_allocates_nothing() {
    let check = |payload: &[u8]| {
        let mut buffer = BytesMut::from(&(payload.len() as u32).to_le_bytes()[..]);
        buffer.extend_from_slice(payload);
        let error = Decoder::<Reply>::new(FrameClass::Assets).next(&mut buffer).expect_err("cannot hold it");
        error.to_string()
    };
    let text = check(&[&[4, 252][..], &60_000_000u32.to_le_bytes(), b"{}"].concat());
    assert_eq!(text, "cannot decode 8 bytes: LimitExceeded");
    let list = check(&[&[2, 0, 252][..], &u32::MAX.to_le_bytes(), &[1, 2, 3]].concat());
    assert!(list.starts_with("cannot decode 10 bytes: "), "{list}");
}

#[test]
fn what_the_limits_allow_fits_its_frame() {
    let draft = messages::draft(vec![u32::MAX; types::limits::PROMPT_TOKENS_MAX]);
    let request = Request::Generate(Box::new(draft.try_into().expect("valid")));
    assert!(frame(FrameClass::Request, &request).len() > 5 << 20);
    let assets = ModelAssets {
        tokenizer_json: "x".repeat(types::limits::ASSETS_BYTES_MAX),
        chat_template: None,
        bos_token: None,
        eos_token: None,
    };
    assert!(assets.fits());
    let mut buffer = frame(FrameClass::Assets, &Reply::Assets(assets.clone()));
    let back = Decoder::<Reply>::new(FrameClass::Assets).next(&mut buffer).expect("valid");
    assert_eq!(back, Some(Reply::Assets(assets)));
}

/// An invalid request cannot be made of bytes either.
#[test]
fn a_request_is_checked_when_decoded() {
    let mut buffer = frame(FrameClass::Engine, &Unchecked::Submit(messages::draft(Vec::new())));
    let error =
        Decoder::<EngineCommand>::new(FrameClass::Engine).next(&mut buffer).expect_err("empty prompt");
    assert!(error.to_string().contains("the prompt is empty"), "{error}");

    #[derive(Serialize)]
    enum Unchecked {
        Submit(types::GenerateDraft),
    }
}

#[test]
fn foreign_prefaces_are_named() {
    use wire::preface::{check, of_version, preface};
    assert_eq!(check(preface()), Ok(()));
    let error = check(of_version(wire::VERSION + 41)).expect_err("another version").to_string();
    assert!(
        error.contains(&format!("version {} there, {} here", wire::VERSION + 41, wire::VERSION)),
        "{error}"
    );
    let error = check(*b"GET / HT").expect_err("not ours").to_string();
    assert_eq!(error, "not an mlx-node: the connection starts with [47, 45, 54, 20]");
}
