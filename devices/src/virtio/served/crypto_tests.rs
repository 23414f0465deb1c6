use super::*;

/// A request of §5.9.7.2.1: header, union, keys.
fn request(op_code: u32, union: &[u32], keys: &[u8]) -> Vec<u8> {
    let mut words = vec![op_code, 0, 0, 0];
    words.extend(union);
    words.resize(18, 0);
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend_from_slice(keys);
    bytes
}

/// The union of a symmetric session, with the kind after 48 bytes.
fn symmetric(words: &[u32], kind: u32) -> Vec<u32> {
    let mut union = words.to_vec();
    union.resize(12, 0);
    union.push(kind);
    union
}

#[test]
fn cipher_session_is_read_with_its_key() {
    // AES-CBC, 16 bytes, encrypt.
    let bytes = request(2, &symmetric(&[3, 16, 1], 1), &[0xaa; 16]);
    let Asked::Create(session) = parse(&bytes) else { panic!() };
    let expected = SymmetricSession {
        op_code: 2,
        cipher_algorithm: 3,
        op_type: 1,
        direction: 1,
        cipher_key: vec![0xaa; 16],
        ..SymmetricSession::default()
    };
    assert_eq!(*session, expected);
}

#[test]
fn chained_session_is_read_with_both_keys() {
    // Hash then cipher, authenticated: AES-CBC with a key of 32 bytes, decrypt; HMAC-SHA1 of 20 bytes with a
    // key of 4 bytes; 12 bytes of AAD.
    let words = [1, 2, 3, 32, 2, 0, 2, 20, 4, 0, 12];
    let keys = [vec![1; 32], vec![2; 4]].concat();
    let Asked::Create(session) = parse(&request(2, &symmetric(&words, 2), &keys)) else { panic!() };
    assert_eq!((session.chain_order, session.hash_mode, session.direction, session.op_type), (1, 2, 2, 2));
    assert_eq!((session.hash_algorithm, session.digest_length, session.aad_length), (2, 20, 12));
    assert_eq!((session.cipher_key.clone(), session.auth_key.clone()), (vec![1; 32], vec![2; 4]));
}

#[test]
fn requests_that_make_no_sense_are_told_so_and_nothing_is_asked_of_the_backend() {
    let nothing = |bytes: &[u8]| match parse(bytes) {
        Asked::Nothing(status) => status,
        other => panic!("{other:?}"),
    };
    assert_eq!(nothing(&[]), 2);
    assert_eq!(nothing(&[0; 71]), 2);
    let good = request(2, &symmetric(&[3, 16, 1], 1), &[0; 16]);
    assert_eq!(nothing(&good[..87]), 2, "half a key");
    assert_eq!(nothing(&request(2, &symmetric(&[3, 65, 1], 1), &[0; 100])), 1, "a key that no message holds");
    assert_eq!(nothing(&request(2, &symmetric(&[3, u32::MAX, 1], 1), &[0; 100])), 1);
    assert_eq!(nothing(&request(2, &symmetric(&[1, 2, 3, 16, 1, 0, 2, 20, u32::MAX], 2), &[0; 100])), 1);
    assert_eq!(
        nothing(&request(2, &symmetric(&[3, 16, 256], 1), &[0; 16])),
        2,
        "a direction of more than a byte"
    );
    assert_eq!(nothing(&request(2, &symmetric(&[3, 16, 1], 0), &[0; 16])), 3, "no operation");
    assert_eq!(nothing(&request(2, &symmetric(&[1, 3, 3, 16, 1], 2), &[0; 16])), 3, "a nested hash");
    for code in [0, 0x102, 0x202, 0x302, 0x404, 0x405, u32::MAX] {
        assert_eq!(nothing(&request(code, &[], &[])), 3, "{code:#x}");
    }
    assert_eq!(parse(&request(3, &[7, 1], &[])), Asked::Close(SessionId(1 << 32 | 7)));
}

#[test]
fn answers_are_a_session_or_a_status() {
    let created = [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(Done::Created(SessionId(7)).encode(16), created);
    assert_eq!(Done::Closed.encode(1), [0]);
    assert_eq!(Done::Closed.encode(16), [0]);
    assert_eq!(Done::UNKNOWN.encode(1), [4]);
    assert_eq!(Done::REFUSED.encode(16)[8..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_driver_holds_so_many_sessions_and_no_more() {
    let mut sessions = Sessions::default();
    (0..1024).for_each(|id| sessions.add(SessionId(id)));
    assert!(!sessions.have_room());
    assert!(sessions.remove(SessionId(5)) && !sessions.remove(SessionId(5)) && sessions.have_room());
    assert_eq!(sessions.take().count(), 1023);
    assert!(sessions.is_empty());
}
