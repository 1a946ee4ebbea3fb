#include "launcher/bench/interface_counter.h"

#include "tests/trainer/scratch_directory.h"

#include <array>

#include <gmock/gmock.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

namespace lowband {
namespace {

TEST(InterfaceCounter, CountsWhatIsSent) {
  const InterfaceCounter counter("lo");
  EXPECT_EQ(counter.identity(), InterfaceCounter("lo").identity());
  const int receiver = ::socket(AF_INET, SOCK_DGRAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  ASSERT_EQ(::bind(receiver, reinterpret_cast<sockaddr*>(&address), length), 0);
  ASSERT_EQ(::getsockname(receiver, reinterpret_cast<sockaddr*>(&address), &length), 0);
  const Index before = counter.sent_bytes();
  const std::array<char, 1000> message{};
  for (int i = 0; i < 10; ++i)
    ASSERT_EQ(
        ::sendto(receiver, message.data(), message.size(), 0, reinterpret_cast<sockaddr*>(&address), length),
        1000);
  EXPECT_GE(counter.sent_bytes() - before, 10000);
  ::close(receiver);
}

TEST(InterfaceCounter, NamesTheInterfacesThereAre) {
  const std::string message = thrown_message<InvalidArgument>([] { InterfaceCounter("nowhere7"); });
  EXPECT_THAT(message, testing::HasSubstr("--interface: found nowhere7, expected one of"));
  EXPECT_THAT(message, testing::HasSubstr("lo"));
}

}  // namespace
}  // namespace lowband
