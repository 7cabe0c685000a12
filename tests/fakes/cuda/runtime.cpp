#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace fake_cuda {
namespace {

constexpr auto kGlance = std::chrono::microseconds(200);  // how often another process's events are looked at

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value ? value : otherwise;
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

}  // namespace

thread_local int current_device = 0;

Settings Settings::from_environment() {
    Settings settings;
    const int num_devices = std::stoi(setting("NODESERVE_FAKE_CUDA_DEVICES", "2"));
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    for (const std::string& part : split(visible ? visible : "", ','))
        if (const int device = std::stoi(part); device < num_devices) settings.devices.push_back(device);
    if (!visible)
        for (int device = 0; device < num_devices; ++device) settings.devices.push_back(device);
    const std::string peers = setting("NODESERVE_FAKE_CUDA_PEERS", "all");
    settings.all_peers = peers == "all";
    if (peers != "all" && peers != "none")
        for (const std::string& pair : split(peers, ',')) {
            const int first = std::stoi(pair), second = std::stoi(pair.substr(pair.find('-') + 1));
            settings.peers.insert({{first, second}, {second, first}});
        }
    const std::string mode = setting("NODESERVE_FAKE_CUDA_MODE", "threaded");
    if (mode != "lazy" && mode != "threaded") throw std::runtime_error("NODESERVE_FAKE_CUDA_MODE: lazy or threaded");
    settings.lazy = mode == "lazy";
    settings.memory_bytes = std::stoull(setting("NODESERVE_FAKE_CUDA_MEMORY_BYTES", "1073741824"));
    settings.seed = static_cast<unsigned>(std::stoul(setting("NODESERVE_FAKE_CUDA_SEED", "0")));
    return settings;
}

bool Settings::can_access(int physical, int peer) const {
    return physical == peer || all_peers || peers.contains({physical, peer});
}

void Runtime::configure() {
    settings = Settings::from_environment();
    random.seed(settings.seed);
    calls.clear();
    failures.clear();
    for (int device = 0; device < static_cast<int>(settings.devices.size()); ++device) {
        if (stream_at(nullptr, device)) continue;
        streams.push_back(std::make_unique<CUstream_st>());
        streams.back()->device = device;
        streams.back()->is_default = true;
    }
    for (const std::string& wanted : split(setting("NODESERVE_FAKE_CUDA_FAIL", ""), ',')) {
        const auto parts = split(wanted, ':');  // function:call:number
        failures[parts.at(0)] = {std::stoi(parts.at(1)), std::stoi(parts.at(2))};
    }
}

Runtime& runtime() {
    static Runtime* const only = new Runtime;
    return *only;
}

cudaError_t entered(Runtime& runtime, const char* function) {
    ++runtime.calls[function];
    const auto wanted = runtime.failures.find(function);
    if (wanted == runtime.failures.end() || --wanted->second.calls_left > 0) return cudaSuccess;
    const int number = wanted->second.number;
    runtime.failures.erase(wanted);
    return static_cast<cudaError_t>(number);
}

bool Runtime::covers(const void* memory, std::size_t num_bytes) const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    auto after = allocations.upper_bound(address);
    return after != allocations.begin() && address + num_bytes <= (--after)->first + after->second.num_bytes;
}

std::size_t Runtime::used_bytes(int device) const {
    std::size_t used = 0;
    for (const auto& [address, allocation] : allocations)
        if (allocation.kind == Allocation::OWN && allocation.device == device) used += allocation.num_bytes;
    return used;
}

std::size_t Runtime::num_pending() const {
    std::size_t pending = 0;
    for (const auto& stream : streams) pending += stream->jobs.size();
    return pending;
}

CUstream_st* Runtime::stream_at(cudaStream_t stream, int device) {
    const bool is_default = reinterpret_cast<std::uintptr_t>(stream) <= 2;
    for (const auto& known : streams)
        if (is_default ? known->is_default && known->device == device : known.get() == stream && !known->destroyed)
            return known.get();
    return nullptr;
}

void Runtime::put(CUstream_st* stream, Job job) {
    stream->jobs.push_back(std::move(job));
    if (!settings.lazy && !thread_runs) {
        thread_runs = true;
        std::thread([this] { run_for_ever(); }).detach();
    }
    changed.notify_all();
}

void Runtime::run_head(CUstream_st* stream) {
    Job job = std::move(stream->jobs.front());
    stream->jobs.pop_front();
    if (job.run) job.run();
}

bool Runtime::step(CUstream_st* stream) {
    if (stream->jobs.empty()) return true;
    const Job& head = stream->jobs.front();
    if (!head.ready()) return step_towards(*head.awaited);
    run_head(stream);
    return true;
}

bool Runtime::step_towards(const EventCounts& counts) {
    for (const auto& stream : streams)
        for (const Job& job : stream->jobs)
            if (job.recorded && job.recorded->counts.get() == &counts) return step(stream.get());
    return false;
}

bool Runtime::step_any() {
    std::vector<CUstream_st*> ready;
    for (const auto& stream : streams)
        if (!stream->jobs.empty() && stream->jobs.front().ready()) ready.push_back(stream.get());
    if (ready.empty()) return false;
    run_head(ready[random() % ready.size()]);
    return true;
}

void Runtime::run_for_ever() {
    std::unique_lock held(lock);
    while (true) {
        if (!settings.lazy && step_any()) {
            changed.notify_all();
            held.unlock();  // between two jobs others may come in
            held.lock();
        } else if (!settings.lazy && num_pending() > 0) {
            changed.wait_for(held, kGlance);  // what it waits for is in another process
        } else {
            changed.wait(held);
        }
    }
}

void Runtime::wait_until(std::unique_lock<std::mutex>& held, const std::function<bool()>& done,
                         const std::function<bool()>& step) {
    while (!done())
        if (!settings.lazy || !step()) changed.wait_for(held, kGlance);
}

void Runtime::drain(std::unique_lock<std::mutex>& held) {
    wait_until(held, [&] { return num_pending() == 0; }, [&] { return step_any(); });
}

}  // namespace fake_cuda
