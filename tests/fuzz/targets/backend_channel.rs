//! The backend's own channel: the same bytes, in one piece and in many, are the same requests and get the
//! same answers.
#![no_main]

use fuzz::descriptors::none_left;
use fuzz::handler::Handler;
use fuzz::input::Input;
use fuzz::peer::{Peer, any_request};
use libfuzzer_sys::fuzz_target;
use transport::vhost_user::{BackendChannel, ProtocolFeatures, Served, Session, Wanted};

/// What came of some bytes: the requests, the answers, and how it ended.
type Outcome = (Vec<String>, Vec<u8>, Option<String>);

fuzz_target!(|data: &[u8]| {
    none_left(|| {
        let mut input = Input::new(data);
        let (cut, protocol) = (input.byte(), if input.byte() < 128 { u64::MAX } else { input.u64() });
        let mut bytes = Vec::new();
        while !input.is_empty() && bytes.len() < 768 {
            // Descriptors cannot be cut up: they are the conversation's.
            bytes.extend(match input.rarely(8) {
                true => input.bytes(32),
                false => any_request(&mut input).0,
            });
        }
        let whole = serve(&bytes, bytes.len(), protocol);
        // Not too many: each piece costs some system calls.
        let piece = (usize::from(cut) + 1).max(bytes.len() / 32);
        assert_eq!(whole, serve(&bytes, piece, protocol), "cut every {piece} bytes");
    });
});

fn open(protocol: u64) -> (Peer, Session, BackendChannel) {
    let needed = ProtocolFeatures::BACKEND_REQ.with(ProtocolFeatures::REPLY_ACK);
    let wanted = Wanted::default().and(ProtocolFeatures::from_bits(protocol)).and(needed);
    let (peer, connection) = Peer::new(Input::default());
    let mut session = connection.negotiate(&wanted).expect("a good backend");
    let channel = session.take_backend_channel().expect("it was negotiated");
    (peer, session, channel)
}

fn serve(bytes: &[u8], piece: usize, protocol: u64) -> Outcome {
    let (peer, _session, mut channel) = open(protocol);
    let handler = Handler::default();
    let (mut answers, mut end) = (Vec::new(), None);
    for piece in bytes.chunks(piece.max(1)) {
        peer.send_on_channel(piece);
        loop {
            let served = channel.serve(&handler);
            answers.extend(peer.answers());
            match served {
                Ok(Served::Requests(0)) => break,
                Ok(Served::Requests(_)) => {}
                Ok(Served::HungUp | Served::Deferred) => panic!("nobody hung up, and nothing is put off"),
                Err(error) => {
                    end = Some(error.to_string());
                    assert_eq!(channel.serve(&handler).ok(), Some(Served::HungUp), "the channel has ended");
                    break;
                }
            }
        }
        if end.is_some() {
            break;
        }
    }
    (handler.seen.into_inner().expect("no panic"), answers, end)
}
