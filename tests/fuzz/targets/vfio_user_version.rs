//! The VERSION reply of a vfio-user server: whatever its JSON says, what is agreed on is no more than was
//! proposed.
#![no_main]

use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use transport::vfio_user::{Capabilities, capabilities, parse_reply};

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    if let Err(fault) = capabilities(data) {
        drop(fault.to_string());
    }
    let Ok((version, twin)) = parse_reply(data) else { return };
    let (agreed, ours) = (version.agreed, Capabilities::OURS);
    assert!(agreed.max_msg_fds <= ours.max_msg_fds && agreed.max_dma_maps <= ours.max_dma_maps);
    assert!((8..=ours.max_data_xfer_size).contains(&agreed.max_data_xfer_size));
    assert!(agreed.max_dma_maps > 0 && agreed.page_size() >= 4096 && agreed.page_size().is_power_of_two());
    assert_eq!(twin.is_some(), agreed.twin_socket);
    assert!(version.server.0 == 0 && version.server.1 <= 1);
});

fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "",
        "{}\0",
        "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}}}\0",
        "{\"capabilities\":{\"max_dma_maps\":65535,\"pgsizes\":4096,\"write_multiple\":true,\
         \"twin_socket\":{\"supported\":true,\"fd_index\":0}}}\0",
    ];
    texts.iter().map(|text| [&[0, 0, 1, 0], text.as_bytes()].concat()).collect()
}
