//! Writes the client's stubs: `generator DESCRIPTOR_SET FOLDER`.

use std::error::Error;
use std::{env, fs};

use prost::Message;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let [_, descriptors, folder] = arguments.as_slice() else {
        return Err("usage: generator DESCRIPTOR_SET FOLDER".into());
    };
    fs::create_dir_all(folder)?;
    tonic_prost_build::configure()
        .out_dir(folder)
        // Tests implement what they need.
        .generate_default_stubs(true)
        .server_mod_attribute(".", "#[cfg(feature = \"server\")]")
        .compile_fds(FileDescriptorSet::decode(&*fs::read(descriptors)?)?)?;
    Ok(())
}
