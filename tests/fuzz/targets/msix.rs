//! An MSI-X table under a guest that writes anything: it reads back as a plain array of words would, a vector
//! has a route exactly while it is live, and a signal is pending or delivered, never neither.
#![no_main]

use std::sync::Arc;

use devices::pci::{ConnectionId, Msix};
use fuzz::descriptors::none_left;
use fuzz::input::Input;
use fuzz::ports::Recorder;
use libfuzzer_sys::fuzz_target;
use transport::vhost_user::vring::Call;

fuzz_target!(|data: &[u8]| {
    none_left(|| drive(data));
});

fn drive(data: &[u8]) {
    let mut input = Input::new(data);
    let count = u16::from(input.byte() % 70) + 1;
    let refuse = input.byte();
    let machine = Recorder::refusing(if refuse < 240 { 0 } else { usize::from(refuse - 239) });
    let mut refused = false;
    let mut msix = Msix::new(count, machine.ports().interrupts);
    // The model: bytes of the table, the control register, who is where.
    let mut table: Vec<u8> = (0..count).flat_map(|_| (0..16).map(|at| u8::from(at == 12))).collect();
    let mut control = 0_u16;
    let mut calls: Vec<(ConnectionId, Option<u16>, Arc<Call>)> = Vec::new();
    while !input.is_empty() {
        match input.byte() % 8 {
            0 => {
                control = input.u16() & 0xc000;
                refused |= msix.set_control(control | input.u16() & 0x3fff).is_err();
            }
            1 | 2 => {
                let at = if input.rarely(8) {
                    input.number()
                } else {
                    u64::from(input.u16()) % (table.len() as u64 + 8)
                };
                let bytes = input.bytes(8);
                refused |= msix.write_table(at, &bytes).is_err();
                for (at, byte) in (0..).map_while(|n| at.checked_add(n)).zip(&bytes) {
                    let kept = match at % 16 {
                        12 => 1,
                        13.. => 0,
                        _ => 0xff,
                    };
                    if let Some(place) = usize::try_from(at).ok().and_then(|at| table.get_mut(at)) {
                        *place = byte & kept;
                    }
                }
            }
            3 => {
                // A vector is unmasked with a message.
                let at = u64::from(input.u16() % count) * 16;
                let data = u32::from(input.byte());
                refused |= msix.write_table(at + 8, &data.to_le_bytes()).is_err();
                refused |= msix.write_table(at + 12, &[0; 4]).is_err();
                let at = at as usize;
                table[at + 8..at + 16].copy_from_slice(&u64::from(data).to_le_bytes());
            }
            4 if calls.len() < 8 => {
                let vector = (!input.rarely(8)).then(|| u16::from(input.byte() % 80));
                let call = Arc::new(Call::new().expect("an eventfd"));
                match msix.connect(vector, Arc::clone(&call)) {
                    Ok(id) => calls.push((id, vector, call)),
                    Err(_) => refused = true,
                }
            }
            5 if !calls.is_empty() => {
                let at = input.below(calls.len());
                let (id, vector, _) = &mut calls[at];
                *vector = (!input.rarely(8)).then(|| u16::from(input.byte() % 80));
                refused |= msix.retarget(*id, *vector).is_err();
            }
            6 if !calls.is_empty() => {
                let (id, ..) = calls.swap_remove(input.below(calls.len()));
                msix.disconnect(id);
            }
            _ if !calls.is_empty() => calls[input.below(calls.len())].2.ring().expect("an eventfd"),
            _ => {}
        }
        check(&msix, &table, control, &calls, &machine, refused);
    }
    drop(msix);
    assert_eq!(machine.counts(), (0, 0));
}

fn check(
    msix: &Msix,
    table: &[u8],
    control: u16,
    calls: &[(ConnectionId, Option<u16>, Arc<Call>)],
    machine: &Recorder,
    refused: bool,
) {
    let mut read = vec![0xaa; table.len()];
    msix.read_table(0, &mut read);
    assert_eq!(read, table);
    assert_eq!(msix.control() & 0xc000, control);
    let exists = |vector: u16| usize::from(vector) * 16 < table.len();
    let live = |vector: u16| exists(vector) && control == 0x8000 && table[usize::from(vector) * 16 + 12] == 0;
    let routes = calls.iter().filter(|(_, vector, _)| vector.is_some_and(live)).count();
    if !refused {
        assert_eq!(machine.counts().1, routes);
    }
    let mut pending = vec![0; table.len() / 128 + 8];
    msix.read_pba(0, &mut pending);
    for vector in 0..(table.len() / 16) as u16 {
        let bit = pending[usize::from(vector) / 8] >> (vector % 8) & 1 != 0;
        if live(vector) && !refused {
            assert!(!bit, "vector {vector} is live and pending");
        }
    }
}
